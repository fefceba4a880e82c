"""LLaVA-STF: LLaVA-1.5 with a compact projector that reads several blocks of a tower cut short."""

from dataclasses import field
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache, LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .core.config import FEATURE_ORDER, complete, published_blocks
from .core.model import CompactGeneration, CompactModel
from .core.projector import build_projector
from .core.register import register
from .processing import LlavaStfProcessor


@strict
class LlavaStfConfig(LlavaConfig):
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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        complete(self)


class LlavaStfModel(CompactModel, LlavaModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaStfConfig

    def __init__(self, config: LlavaStfConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """`.pooler_output`: a list of N tensors [(H//r)*(W//r), D]. Frames of a video are N images, encoded together.

        Raises ValueError for `image_sizes` (the grid is fixed) and for a select strategy other than the config's.
        """
        self._check_options(vision_feature_select_strategy, image_sizes)
        features = self.project_images(pixel_values, vision_feature_layer)
        return BaseModelOutputWithPooling(pooler_output=list(features))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> tuple | LlavaModelOutputWithPast:
        """As LlavaModel.forward: input_ids [B, S], pixel_values [N, 3, S, S] or already encoded images.

        Token counts of ids on the CPU are checked before anything runs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "none" if input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: expected exactly one of them, got {got}")
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("pixel_values, mm_encoder_outputs: expected at most one of them, got both")
        self._check_options(vision_feature_select_strategy, image_sizes)
        self.check_prompt(input_ids, pixel_values, encoded, past_key_values)
        inputs_embeds, tokens = self.embed_prompt(input_ids, inputs_embeds, pixel_values, encoded, vision_feature_layer)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=tokens,
        )

    def _check_options(self, strategy: str | None, image_sizes: Tensor | None) -> None:
        expected = self.config.vision_feature_select_strategy
        if strategy not in (None, expected):
            raise ValueError(f"vision_feature_select_strategy: expected {expected!r} for this tower, got {strategy!r}")
        if image_sizes is not None:
            raise ValueError("image_sizes: expected None, every image has the grid of the vision tower; got sizes")


class LlavaStfForConditionalGeneration(CompactGeneration, LlavaForConditionalGeneration):
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
