"""The rows of the table: LLaVA-1.5 with seeded random weights or a checkpoint's, and what shares its weights.

llava-1.5       mlp2x      the model as transformers runs it
llava-1.5-skip  mlp2x      the same without the tower layer whose output nobody reads
llava-1.5-pool  mlp2x      the stock projector's tokens averaged 2x2
llava-stf       reference  LLaVA-STF with the projector of reference/, plain PyTorch
llava-stf       fused      LLaVA-STF with the projector of stf_kernels, the same parameters

Of llava-next and llava-onevision two rows: the model as transformers runs it, mlp2x, and its -stf, fused.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_integration.core.tower import tower_hidden_states
from llava_integration.llava_stf import LlavaStfModel

from ..command import BadInput
from ..kernels.problems import reference_projector
from ..results import first_line
from .presets import Point, Preset

STD = 0.02
SKIP = "llava-1.5-skip"
POOL = 16_777_213  # a prime, so that rows of a matrix never line up with the pool's period


class Row(NamedTuple):
    """One line of the table: a model, and how many image tokens its prompt holds."""

    model: str
    projector: str
    module: nn.Module
    image_tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.projector}"


def build_stock(preset: Preset, *, device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The stock model at the preset's sizes with random weights."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(preset.config, dtype=dtype)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def load_stock(folder: Path, *, device: str, dtype: torch.dtype) -> nn.Module:
    """A LLaVA-1.5 checkpoint from a folder; nothing is fetched."""
    from transformers import LlavaForConditionalGeneration

    options = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": True}
    try:
        model = LlavaForConditionalGeneration.from_pretrained(folder, **options)
    except Exception as error:  # a file cut short, a tensor of another shape: each has an exception of its own
        raise BadInput(f"--model: {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Uniform with standard deviation 0.02, norms' scales one. A draw per element would take a quarter of a CPU run."""
    device = next(module.parameters()).device
    pool = torch.empty(POOL, device=device)
    pool.uniform_(-STD * 3**0.5, STD * 3**0.5, generator=torch.Generator(device).manual_seed(seed))
    pool, start = torch.cat([pool, pool]), 0
    for name, parameter in module.named_parameters():
        for piece in parameter.view(-1).split(POOL):
            piece.copy_(pool[start : start + len(piece)])
        start = (start + parameter.numel() + 7919) % POOL
        if parameter.ndim == 1 and name.endswith("weight"):  # a norm's scale
            parameter.fill_(1)


class AsStock(LlavaStfModel):
    """The tower with every layer, all images in one piece, their tokens inserted by a copy: as the stock model does."""

    def encode_blocks(self, pixel_values: Tensor, layers: int | list[int] | None = None) -> list[Tensor]:
        return tower_hidden_states(self.vision_tower, pixel_values, self._layers(layers), run_all=True)

    def _writes_in_place(self, inputs_embeds: Tensor) -> bool:
        return False


class Pool(nn.Module):
    """The mean of every r x r neighbourhood of a square grid: [B, H*W, D] -> [B, H*W/r*r, D]"""

    def __init__(self, merge_size: int) -> None:
        super().__init__()
        self.merge_size = merge_size

    def forward(self, tokens: Tensor) -> Tensor:
        image = tokens.transpose(1, 2).unflatten(2, [math.isqrt(tokens.shape[1])] * 2)
        return F.avg_pool2d(image, self.merge_size).flatten(2).transpose(1, 2)


def share(model: nn.Module) -> nn.Module:
    """Another module tree over the same tensors: what is changed in the one's structure is not in the other's."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def without_last_layer(model: nn.Module) -> nn.Module:
    """The stock model reading hidden_states[-2], as its own output of a tower that is one layer shorter."""
    shorter = share(model)
    tower, config = shorter.model.vision_tower, shorter.config
    tower.encoder.layers = tower.encoder.layers[:-1]
    # Counted from the front: -2 would silently read another layer.
    config.vision_feature_layer = len(tower.encoder.layers)
    config.vision_config.num_hidden_layers = tower.config.num_hidden_layers = len(tower.encoder.layers)
    return shorter


def build_rows(stock: nn.Module, preset: Preset, *, full: bool) -> list[Row]:
    """Three rows, or with `full` all five. The STF projector is the exact warm start until it is randomised."""
    from llava_integration import from_llava

    many, few = preset.image_tokens(1), preset.image_tokens(preset.merge_size)
    fused, family, rows = from_llava(stock).eval().requires_grad_(False), preset.family, []
    if preset.size:
        return [Row(family, "mlp2x", stock, many), Row(f"{family}-stf", "fused", fused, few)]
    if full:
        pooled = share(stock)
        pooled.model.multi_modal_projector = nn.Sequential(pooled.model.multi_modal_projector, Pool(2))
        rows = [Row(SKIP, "mlp2x", without_last_layer(stock), many), Row("llava-1.5-pool", "mlp2x", pooled, few)]
    fused.model.__class__ = AsStock
    plain = share(fused)
    plain.model.multi_modal_projector = reference_projector(fused.model.multi_modal_projector)
    rows += [Row("llava-stf", "reference", plain, few), Row("llava-stf", "fused", fused, few)]
    return [Row("llava-1.5", "mlp2x", stock, many), *rows]


def image_processor(preset: Preset) -> Callable[[Any, int], Tensor]:
    """(photograph, count) -> pixel values, through the family's processor: resize, crop or cut, normalise."""
    from transformers import CLIPImageProcessorPil

    square = {"height": preset.side, "width": preset.side}
    if preset.size:
        cut = {"size": square, "image_grid_pinpoints": preset.config.image_grid_pinpoints}
        processor = preset.kind("ImageProcessorPil")(crop_size=square, **cut)
    else:
        processor = CLIPImageProcessorPil(crop_size=square, size={"shortest_edge": preset.side})
    return lambda image, count: processor(images=[image] * count, return_tensors="pt")["pixel_values"]


def build_inputs(preset: Preset, pixels: Tensor, point: Point, image_tokens: int, **factory: Any) -> dict[str, Tensor]:
    """A prompt: seeded random ids around the images of a sequence, `image_tokens` each, one behind the other."""
    shape, token = (point.batch, point.text_tokens), preset.config.image_token_id
    text = torch.randint(3, token, shape, generator=torch.Generator().manual_seed(0))
    before = point.text_tokens // 2  # the system sentence stands before the image, the question after it
    placeholder = torch.full((point.batch, point.images * image_tokens), token)
    ids = torch.cat([text[:, :before], placeholder, text[:, before:]], dim=1).to(factory["device"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(**factory)}
    if preset.size:
        inputs["image_sizes"] = torch.tensor([preset.size] * len(pixels), device=factory["device"])
    return inputs
