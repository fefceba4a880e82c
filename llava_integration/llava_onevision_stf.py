"""LLaVA-OneVision with a compact projector: of every tile and every frame of a video, a fraction of the tokens.

What its own 2x2 pooling makes of a frame, 196 of 729 tokens, the windows do: 81 of them with r = 3, 169 with r = 2.
"""

import math
from dataclasses import field

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
from transformers.processing_utils import MultiModalData

from .core.config import CompactConfig, default_blocks
from .core.model import CompactGeneration, forward_of
from .core.register import register
from .core.tiles import TiledModel
from .processing import CompactProcessor


@strict
class LlavaOnevisionStfConfig(CompactConfig, LlavaOnevisionConfig):
    model_type = "llava_onevision_stf"

    vision_feature_layer: int | list[int] | tuple[int, ...] = field(default_factory=lambda: default_blocks(26))
    spatial_merge_size: int = 3


class LlavaOnevisionStfModel(TiledModel, LlavaOnevisionModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaOnevisionStfConfig
    forward = forward_of(LlavaOnevisionModel)
    get_video_features = TiledModel.video_features

    def end_videos(self, tokens: Tensor) -> Tensor:
        """A newline behind each video."""
        return torch.cat([tokens, self.image_newline.to(tokens).expand(len(tokens), 1, -1)], dim=1)


class LlavaOnevisionStfForConditionalGeneration(
    CompactGeneration, LlavaOnevisionForConditionalGeneration, GenerationMixin
):
    """LlavaOnevisionStfModel with its language modeling head."""

    config: LlavaOnevisionStfConfig
    model_class = LlavaOnevisionStfModel


class LlavaOnevisionStfProcessor(CompactProcessor, LlavaOnevisionProcessor):
    """Image processor and tokenizer in one; `num_image_tokens` is how many windows a tile has."""

    groups_images = True

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @staticmethod
    def grid(processor: LlavaOnevisionProcessor) -> tuple[int, int, int]:
        side = math.isqrt(processor.num_image_tokens)
        return 0, side, processor.num_image_tokens - side**2  # a CLS token is counted

    @staticmethod
    def sizes(patch: int, side: int, r: int, prefix: int) -> dict[str, int]:
        return {"num_image_tokens": (side // r) ** 2 + prefix}

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


register(LlavaOnevisionStfForConditionalGeneration, LlavaOnevisionStfProcessor)
