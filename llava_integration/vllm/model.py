"""vLLM's models with this library's projector: its towers, cache and language models, and the fused operators between.

    pixels [N, 3, S, S] -> hidden states of the chosen layers -> CompactTokenProjector -> [N, (H//r)*(W//r), D]

A class has the name that it has in llava_integration, and is made when vLLM asks for it, in front of vLLM's own of the
stock family. The projector is whole on every rank of tensor parallelism: it is a hundredth of the model, and a split
would end the chain in a wait.
"""

import functools
import re
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ProcessorMixin
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..clients import check_folder
from ..core.config import vision_grid
from ..core.model import build_projector
from ..core.register import Family, families
from ..core.tiles import pack_tiles, tile_counts

# The tensor names of every transformers: [model.]vision_tower.[vision_model.]*
TOWER = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"): "vision_tower.vision_model."}
)


class Info:
    """Whose processor it is, and how many tokens an image or a frame becomes."""

    family: Family
    ctx: Any

    def get_hf_processor(self, **kwargs: object) -> ProcessorMixin:
        check_folder(self.ctx.model_config.model)  # not before: a ValueError then means "text alone" to vLLM
        return self.ctx.get_hf_processor(self.family.processor, **kwargs)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        model = without_parts(self.family, self.ctx.model_config.hf_config)
        return model.image_token_counts([None], image_sizes=[(image_height, image_width)])[0]

    def _get_num_frame_tokens(self, **size: int) -> int:
        return self.ctx.model_config.hf_config.image_seq_length


def without_parts(family: Family, config: PreTrainedConfig) -> Any:
    """The family's model as far as it counts and packs the tokens of tiles."""
    model = family.model.__new__(family.model)
    nn.Module.__init__(model)
    model.config = config
    return model


class Compact(nn.Module):
    """In front of vLLM's model of the family."""

    family: Family
    multi_modal_projector: nn.Module

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not isinstance(self.multi_modal_projector, StageMissingLayer):  # it is where no image is allowed
            self.multi_modal_projector = build_projector(self.config)

    def _project(self, pixel_values: Tensor) -> Tensor:
        tower = self.vision_tower.vision_model
        hidden = tower.embeddings(pixel_values)
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        states = tower.encoder(inputs_embeds=hidden, return_all_hidden_states=True)
        blocks = [states[layer] for layer in self.config.vision_feature_layer]
        return self.multi_modal_projector(blocks, vision_grid(self.config.vision_config))

    def _process_image_input(self, image_input) -> Tensor | list[Tensor]:
        if image_input["type"] == "image_embeds":
            return image_input["data"]
        pixels = image_input["pixel_values"]
        if not hasattr(self, "image_newline"):
            return self._project(pixels)
        sizes = image_input["image_sizes"]
        counts = tile_counts(self.config, sizes)[1]
        tiles = torch.cat([own[:count] for own, count in zip(pixels, counts, strict=True)])
        return pack_tiles(without_parts(self.family, self.config), self._project(tiles), self.image_newline, sizes)

    def _video_pixels_to_features(self, vision_tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """The windows take the place of a pooling."""
        return self._project(pixel_values)


@functools.cache
def __getattr__(name: str) -> type:
    family = {family.generator.__name__: family for family in families()}.get(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"vllm.model_executor.models.{family.stock.config_class.model_type}")
    kind, stock = family.stock.__name__.removesuffix("ForConditionalGeneration"), getattr(module, family.stock.__name__)
    mapper = {"hf_to_vllm_mapper": stock.hf_to_vllm_mapper | TOWER}
    model = type(name, (Compact, stock), mapper | {"family": family, "__module__": __name__})
    info = type(f"{kind}StfInfo", (Info, getattr(module, f"{kind}ProcessingInfo")), {"family": family})
    dummies = getattr(module, f"{kind}DummyInputsBuilder", LlavaDummyInputsBuilder)
    processor = getattr(module, f"{kind}MultiModalProcessor")
    return MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=dummies)(model)
