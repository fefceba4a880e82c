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
    """pixel_values [N, 3, S, S] in the pieces that `tower` encodes fastest: whole, on a CPU image by image.

    The activations of more images are paged in anew by every allocation on a CPU, and no cache holds them. A tower
    whose weights are offloaded takes all images at once, to load them once.
    """
    check_pixels(tower, pixel_values)
    on_cpu = next(tower.parameters()).device.type == "cpu"
    return pixel_values.split(1) if on_cpu and not is_captured() else (pixel_values,)


def to_device_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `module`'s weights; as it is where they are offloaded: hooks will move both.

    Weights are buffers where quantised linears keep them so, and out of sight where they are packed.
    """
    weight = next(itertools.chain(module.parameters(), module.buffers()), None)
    return tensor if weight is None or weight.is_meta else tensor.to(weight.device)


def check_pixels(tower: nn.Module, pixel_values: Tensor) -> None:
    """TypeError or ValueError unless pixel_values is a floating-point tensor [N, 3, S, S] of the tower's size."""
    config = tower.config
    expected = [config.num_channels, config.image_size, config.image_size]
    shape = f"[images, {', '.join(map(str, expected))}]"
    if not isinstance(pixel_values, Tensor) or not torch.is_floating_point(pixel_values):
        got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
        raise TypeError(f"pixel_values: expected a floating-point tensor {shape}, got {got}")
    if pixel_values.ndim != 4 or list(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values: expected {shape}, got {list(pixel_values.shape)}; prepare images with the model's processor"
        )
    if pixel_values.shape[0] == 0:
        raise ValueError("pixel_values: expected at least one image or None, got no image")
