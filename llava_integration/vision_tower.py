"""Only the hidden states that are asked for, from only the layers that they need.

    hidden[0] = pre_layrnorm(embeddings(pixels)),   hidden[i] = layer_i(hidden[i - 1])      [N, prefix + H*W, C]

Bit for bit what the stock tower returns as hidden_states, without its hooks: they hold a lock, so
torch.compile(fullgraph=True) cannot trace them, and the stock tower runs every layer and a head besides.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def tower_hidden_states(
    tower: nn.Module, pixel_values: Tensor, layers: Sequence[int], *, run_all: bool = False
) -> list[Tensor]:
    """The hidden states `layers` (non-negative, any order) of a CLIP or SigLIP tower, in the order of `layers`.

    pixel_values [N, 3, S, S] -> len(layers) tensors [N, prefix + H*W, C]. Layers deeper than max(layers) do not run
    unless `run_all`, for what they cost the stock model. Gradient checkpointing and the attention implementation are
    the layers' own. Raises TypeError or ValueError for pixel values that are not a float tensor of this shape.
    """
    _check_pixels(tower, pixel_values)
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


def to_device_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `module`'s parameters; as it is where they are offloaded: hooks will move both."""
    device = next(module.parameters()).device
    return tensor if device.type == "meta" else tensor.to(device)


def _check_pixels(tower: nn.Module, pixel_values: Tensor) -> None:
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


def _commas(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
