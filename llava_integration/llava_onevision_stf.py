"""LLaVA-OneVision with a compact projector: of every tile and every frame of a video, a fraction of the tokens.

What its own 2x2 pooling makes of a frame, 196 of 729 tokens, the windows do: 81 of them with r = 3, 169 with r = 2.
"""

import math
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import (
    GenerationMixin,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import MultiModalData
from transformers.utils.generic import can_return_tuple
from transformers.video_utils import make_batched_videos

from .core.config import CompactConfig, default_blocks, prefix_tokens
from .core.model import CompactGeneration, forward_of
from .core.register import register
from .core.tiles import TiledModel, TiledProcessor


@strict
class LlavaOnevisionStfConfig(CompactConfig, LlavaOnevisionConfig):
    model_type = "llava_onevision_stf"

    vision_feature_layer: int | list[int] | tuple[int, ...] = field(default_factory=lambda: default_blocks(26))
    spatial_merge_size: int = 3


class LlavaOnevisionStfModel(TiledModel, LlavaOnevisionModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaOnevisionStfConfig
    forward = forward_of(LlavaOnevisionModel)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        whole_tower: bool = True,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """[videos, frames, 3, S, S] -> `.pooler_output` [videos, frames * (H//r)*(W//r) + 1, D], a newline at the end.

        In transformers 5.17 the first argument is `pixel_values`.
        """
        frames = kwargs.pop("pixel_values", pixel_values_videos)
        if not isinstance(frames, Tensor) or frames.ndim != 5:
            got = list(getattr(frames, "shape", [])) or type(frames).__name__
            raise ValueError(f"pixel_values_videos: expected [videos, frames, 3, S, S], got {got}")
        self.check_options(vision_feature_select_strategy, **kwargs)
        outputs = self.image_outputs(frames.flatten(0, 1), vision_feature_layer, whole_tower, **kwargs)
        tokens = outputs.pooler_output.unflatten(0, frames.shape[:2]).flatten(1, 2)
        newline = self.image_newline.to(tokens).expand(len(tokens), 1, -1)
        outputs.pooler_output = torch.cat([tokens, newline], dim=1)
        return outputs

    def insert_videos(self, input_ids, inputs_embeds, encoded, options):
        """As the stock forward does it, but by ids where there are any: two tokens may have one embedding."""
        pixels, video = options.pop("pixel_values_videos", None), encoded.get("video")
        options.pop("image_sizes_videos", None)
        if pixels is not None:
            video = self.get_video_features(pixels, whole_tower=False, return_dict=True)
        if video is None:
            return inputs_embeds, options
        tokens = video.pooler_output.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, video_features=tokens)[1]
        return inputs_embeds.masked_scatter(mask, tokens), options


class LlavaOnevisionStfForConditionalGeneration(
    CompactGeneration, LlavaOnevisionForConditionalGeneration, GenerationMixin
):
    """LlavaOnevisionStfModel with its language modeling head."""

    config: LlavaOnevisionStfConfig
    model_class = LlavaOnevisionStfModel


class LlavaOnevisionStfProcessor(TiledProcessor, LlavaOnevisionProcessor):
    """Image processor and tokenizer in one; `num_image_tokens` is how many windows a tile has.

    Frames of videos are prepared as images are: transformers' own video processors need torchvision.
    """

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @property
    def video_processor(self):
        return self.image_processor

    def _process_videos(self, videos, **kwargs) -> tuple[dict, list[str]]:
        videos, side = make_batched_videos(videos), self.image_processor.size["height"]
        if len({len(video) for video in videos}) != 1:
            raise ValueError(f"videos: expected as many frames in each, got {[len(video) for video in videos]}")
        frames = [frame for video in videos for frame in video]
        # The base tile of a picture that is cut once: the whole frame, resized.
        pixels = self.image_processor(frames, image_grid_pinpoints=[[side, side]], return_tensors="np")["pixel_values"]
        processed = {"pixel_values_videos": pixels[:, 0].reshape(len(videos), -1, *pixels.shape[2:])}
        return processed, [self.replace_video_token(processed, index) for index in range(len(videos))]

    @staticmethod
    def tile_side(processor: LlavaOnevisionProcessor) -> int:
        return math.isqrt(processor.num_image_tokens)

    @staticmethod
    def windows(processor: LlavaOnevisionProcessor, r: int) -> dict[str, int]:
        side = math.isqrt(processor.num_image_tokens)
        return {"num_image_tokens": (side // r) ** 2 + processor.num_image_tokens - side**2}  # a CLS token is counted

    @staticmethod
    def sizes(config: LlavaOnevisionStfConfig) -> dict[str, Any]:
        tokens = config.image_seq_length + prefix_tokens(config.vision_config)
        return {"num_image_tokens": tokens, "vision_aspect_ratio": config.vision_aspect_ratio}

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        return self.video_token * self._video_tokens(len(video_inputs["pixel_values_videos"][video_idx]))

    def _video_tokens(self, frames: int) -> int:
        return frames * math.isqrt(self.num_image_tokens) ** 2 + 1

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Token counts for images of `image_sizes` [(height, width)] and videos of `video_sizes` [(frames, ...)]."""
        counts = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if video_sizes is not None:
            counts.num_video_tokens = [self._video_tokens(frames) for frames, *_ in video_sizes]
        return counts


register(
    LlavaOnevisionStfConfig,
    LlavaOnevisionStfModel,
    LlavaOnevisionStfForConditionalGeneration,
    LlavaOnevisionStfProcessor,
    stock=LlavaOnevisionForConditionalGeneration,
)
