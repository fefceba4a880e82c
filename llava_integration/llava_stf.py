"""LLaVA-STF: LLaVA-1.5 with a compact projector that reads several blocks of a tower cut short."""

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .core.config import CompactConfig, Layers
from .core.model import FIXED_GRID, CompactGeneration, CompactModel, forward_of
from .core.register import register
from .processing import LlavaStfProcessor


@strict
class LlavaStfConfig(CompactConfig, LlavaConfig):
    model_type = "llava_stf"

    video_token_index: int | None = None  # None: a video stands behind the placeholder of an image

    @property
    def video_token_id(self) -> int:
        return self.image_token_id if self.video_token_index is None else self.video_token_index


class LlavaStfModel(CompactModel, LlavaModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaStfConfig
    input_modalities = ("image", "video", "text")
    forward = forward_of(LlavaModel, "pixel_values_videos")

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: Layers = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        whole_tower: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """What the tower returns, with `.pooler_output`: N tensors [(H//r)*(W//r), D], the tokens of the images.

        whole_tower=False: nothing but the tokens, as `forward` needs them, from the layers that they need.
        Raises ValueError for `image_sizes` (the grid is fixed), for a select strategy other than the config's and for
        `interpolate_pos_encoding`.
        """
        self.check_options(vision_feature_select_strategy, image_sizes, **kwargs)
        outputs = self.image_outputs(pixel_values, vision_feature_layer, whole_tower, **kwargs)
        if whole_tower:
            outputs.pooler_output = list(outputs.pooler_output)
        return outputs

    own_image_features = get_image_features

    get_video_features = CompactModel.video_features

    def check_options(self, vision_feature_select_strategy=None, image_sizes=None, **options) -> None:
        super().check_options(vision_feature_select_strategy, **options)
        if image_sizes is not None:
            raise ValueError(f"image_sizes: expected None, {FIXED_GRID}; got sizes")


class LlavaStfForConditionalGeneration(CompactGeneration, LlavaForConditionalGeneration, GenerationMixin):
    """LLaVA-STF with its language modeling head; `generate()` and every mode of it as for the stock LLaVA."""

    config: LlavaStfConfig
    model_class = LlavaStfModel
    input_modalities = ("image", "video", "text")
    forward = forward_of(LlavaForConditionalGeneration, "pixel_values_videos")


register(LlavaStfForConditionalGeneration, LlavaStfProcessor)
