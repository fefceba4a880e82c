"""Only the hidden states that are asked for, from only the layers that they need.

    hidden[0] = pre_layrnorm(embeddings(pixels)),   hidden[i] = layer_i(hidden[i - 1])      [N, prefix + H*W, C]

Bit for bit what the stock tower returns as hidden_states, without its hooks: they hold a lock, so
torch.compile(fullgraph=True) cannot trace them, and the stock tower runs every layer and a head besides.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .insertion import is_captured

# Larger tensors are mapped and paged in anew by every allocation on a CPU, and no cache holds them.
CPU_ACTIVATION_BYTES = 16 * 2**20


def tower_hidden_states(
    tower: nn.Module, pixel_values: Tensor, layers: Sequence[int], *, run_all: bool = False
) -> list[Tensor]:
    """The hidden states `layers` (non-negative, any order) of a CLIP or SigLIP tower, in the order of `layers`.

    pixel_values [N, 3, S, S] -> len(layers) tensors [N, prefix + H*W, C]. Layers deeper than max(layers) do not run
    unless `run_all`, for what they cost the stock model. Gradient checkpointing and the attention implementation are
    the layers' own. Raises TypeError or ValueError for pixel values that are not a float tensor of this shape.
    """
    check_pixels(tower, pixel_values)
    wanted, found = set(layers), {}
    hidden = tower.embeddings(to_device_of(tower, pixel_values))
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    if 0 in wanted:
        found[0] = hidden
    for index, layer in enumerate(tower.encoder.layers, start=1):
        if index > max(wanted) and not run_all:
            break
        hidden = layer(hidden, attention_mask=None)
        if index in wanted:
            found[index] = hidden
    return [found[layer] for layer in layers]


def image_chunks(tower: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """pixel_values [N, 3, S, S] in the pieces that `tower` encodes fastest: whole, except on a CPU.

    There the widest activation of a piece, [n, prefix + H*W, intermediate_size], stays below CPU_ACTIVATION_BYTES:
    one frame of CLIP-L in fp32, three in bf16. A tower whose weights are offloaded takes all images at once, to load
    them once.
    """
    check_pixels(tower, pixel_values)
    parameter, config = next(tower.parameters()), tower.config
    if parameter.device.type != "cpu" or is_captured():
        return (pixel_values,)
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    frame = tokens * max(config.intermediate_size, config.hidden_size) * parameter.element_size()
    return pixel_values.split(max(CPU_ACTIVATION_BYTES // frame, 1))


def to_device_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `module`'s weights; as it is where they are offloaded: hooks will move both.

    Weights are buffers where quantised linears keep them so, and out of sight where they are packed.
    """
    weight = next(itertools.chain(module.parameters(), module.buffers()), None)
    return tensor if weight is None or weight.is_meta else tensor.to(weight.device)


def check_pixels(tower: nn.Module, pixel_values: Tensor) -> None:
    """TypeError or ValueError unless pixel_values is a floating-point tensor [N, 3, S, S] of the tower's size."""
    config = tower.config
    expected = (config.num_channels, config.image_size, config.image_size)
    if not isinstance(pixel_values, Tensor) or not torch.is_floating_point(pixel_values):
        got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
        raise TypeError(f"pixel_values: expected a floating-point tensor [images, {_commas(expected)}], got {got}")
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values: expected [images, {_commas(expected)}], got {list(pixel_values.shape)}; "
            "prepare images with the model's processor"
        )
    if pixel_values.shape[0] == 0:
        raise ValueError("pixel_values: expected at least one image or None, got no image")


def _commas(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
