"""LLaVA-STF: LLaVA-1.5 with a compact projector that reads several blocks of a tower cut short."""

from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .core.config import FEATURE_ORDER, CompactConfig, published_blocks
from .core.model import CompactGeneration, CompactModel, forward_of
from .core.projector import build_projector
from .core.register import register
from .processing import LlavaStfProcessor


@strict
class LlavaStfConfig(CompactConfig, LlavaConfig):
    r"""Configuration of LLaVA-STF; everything LlavaConfig has, and:

    Args:
        vision_feature_layer (`int` or `list[int]`): hidden states of the tower in concatenation order; 0 is the
            embedding output, i the output of layer i. Stored non-negative.
        vision_feature_select_strategy (`"default"`, `"full"` or `None`): "default" drops the CLS token, "full" keeps
            all tokens. `None` is what the tower needs: "default" for CLIP, "full" for SigLIP, which has no CLS.
        spatial_merge_size (`int`): side r of the window that becomes one token; 1 is MBTF alone.
        spatial_merge_truncate (`bool`): drop the last rows and columns of a grid that r does not divide.
        image_seq_length (`int`, *optional*): tokens per image; derived, an error where it contradicts the grid.
        use_mbtf (`bool`): False is STF alone, for exactly one block.
        mbtf_hidden_size (`int`, *optional*): width between the two linears of MBTF, 4*C by default.
        stf_hidden_size (`int`, *optional*): width between the two linears of STF, 4*r*r*C by default.
        feature_order (`str`): element order of the merged feature axis in the stored weights. Always "patch_major".

    Raises ValueError for what contradicts the tower or itself, and for an unknown tower, activation or feature order.
    """

    model_type = "llava_stf"

    vision_feature_layer: int | list[int] | tuple[int, ...] = field(default_factory=lambda: published_blocks(23))
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    spatial_merge_size: int = 2
    spatial_merge_truncate: bool = False
    image_seq_length: int | None = None
    use_mbtf: bool = True
    mbtf_hidden_size: int | None = None
    stf_hidden_size: int | None = None
    feature_order: str = FEATURE_ORDER


class LlavaStfModel(CompactModel, LlavaModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaStfConfig

    def __init__(self, config: LlavaStfConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    forward = forward_of(LlavaModel)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
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

    def check_options(self, vision_feature_select_strategy=None, image_sizes=None, **options) -> None:
        expected = self.config.vision_feature_select_strategy
        if vision_feature_select_strategy not in (None, expected):
            raise ValueError(
                f"vision_feature_select_strategy: expected {expected!r}, got {vision_feature_select_strategy!r}; the "
                "projector's windows cover the grid of patches, without a CLS token"
            )
        fixed = "every image has the grid of the vision tower, which config.image_seq_length counts"
        if image_sizes is not None:
            raise ValueError(f"image_sizes: expected None, {fixed}; got sizes")
        if options.get("interpolate_pos_encoding"):
            raise ValueError(f"interpolate_pos_encoding: expected False, {fixed}; got True")


class LlavaStfForConditionalGeneration(CompactGeneration, LlavaForConditionalGeneration, GenerationMixin):
    """LLaVA-STF with its language modeling head; `generate()` and every mode of it as for the stock LLaVA."""

    config: LlavaStfConfig

    def __init__(self, config: LlavaStfConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaStfModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


register(
    LlavaStfConfig,
    LlavaStfModel,
    LlavaStfForConditionalGeneration,
    LlavaStfProcessor,
    renames={LlavaStfConfig.model_type: "llava", LlavaStfModel.__name__: "LlavaModel"},
)
