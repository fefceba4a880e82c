"""vLLM's LLaVA with this library's projector: its tower, cache and language model, and the fused operators between.

    pixels [N, 3, S, S] -> hidden states of the chosen layers -> CompactTokenProjector -> [N, image_seq_length, D]

The projector is whole on every rank of tensor parallelism: it is a hundredth of the model, and a split would end the
chain in a wait.
"""

import re

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from .. import LlavaStfConfig, LlavaStfProcessor
from ..core.config import vision_grid
from ..core.projector import build_projector


class ProcessingInfo(LlavaProcessingInfo):
    """How many tokens an image becomes, and the processor that prepares it."""

    def get_hf_config(self) -> LlavaStfConfig:
        config = self.ctx.model_config.hf_config
        if not isinstance(config, LlavaStfConfig):
            raise TypeError(
                f"config.json: expected model_type 'llava_stf' with this architecture, got {config.model_type!r}; "
                "make a LLaVA-STF folder with python -m llava_integration.convert"
            )
        return config

    def get_hf_processor(self, **kwargs: object) -> LlavaStfProcessor:
        try:
            return self.ctx.get_hf_processor(LlavaStfProcessor, **kwargs)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.ctx.model_config.model}: its processor cannot be loaded ({error}); save one beside the model: "
                "LlavaStfProcessor.from_llava(AutoProcessor.from_pretrained(LLAVA)).save_pretrained(FOLDER)"
            ) from error

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.get_hf_config().image_seq_length


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=ProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaStf(LlavaForConditionalGeneration):
    """Serves folders with the tensor names of every transformers: [model.]vision_tower.[vision_model.]*"""

    multi_modal_projector: nn.Module
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"): "vision_tower.vision_model."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(self.multi_modal_projector, StageMissingLayer):  # it is where no image is allowed
            self.multi_modal_projector = build_projector(self.config)

    def _process_image_input(self, image_input) -> Tensor:
        if image_input["type"] == "image_embeds":
            return image_input["data"]
        tower = self.vision_tower.vision_model
        hidden = tower.embeddings(image_input["pixel_values"])
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        states = tower.encoder(inputs_embeds=hidden, return_all_hidden_states=True)
        blocks = [states[layer] for layer in self.config.vision_feature_layer]
        return self.multi_modal_projector(blocks, vision_grid(self.config.vision_config))
