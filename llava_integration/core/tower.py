"""The hidden states that are asked for, from only the layers that they need where nobody can tell.

    hidden[0] = pre_layrnorm(embeddings(pixels)),   hidden[i] = layer_i(hidden[i - 1])      [N, prefix + H*W, C]

Bit for bit what the tower returns as hidden_states, without transformers' own hooks, whose lock torch.compile cannot
trace, and without the layers and the head behind. A tower that is watched or wrapped is called as the module it is.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionModel

from .insertion import is_captured

ENCODERS = {CLIPVisionModel: CLIPEncoder, SiglipVisionModel: SiglipEncoder}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def tower_hidden_states(
    tower: nn.Module, pixel_values: Tensor, layers: Sequence[int], *, run_all: bool = False
) -> list[Tensor]:
    """The hidden states `layers` (non-negative, any order) of a CLIP or SigLIP tower, in the order of `layers`.

    pixel_values [N, 3, S, S] -> len(layers) tensors [N, prefix + H*W, C]. Layers deeper than max(layers) do not run
    unless `run_all`, for what they cost the stock model, or somebody would notice. Gradient checkpointing and the
    attention implementation are the layers' own.
    """
    pixel_values, depth = to_device_of(tower, pixel_values), max(layers)
    if not _is_bare(tower, depth):
        hidden = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return [hidden[layer] for layer in layers]
    hidden = tower.embeddings(pixel_values)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    found = [hidden]
    for index, layer in enumerate(tower.encoder.layers, start=1):
        if index > depth and not run_all:
            break
        hidden = layer(hidden, attention_mask=None)
        found.append(hidden if index in layers else None)
    return [found[layer] for layer in layers]


def _is_bare(tower: nn.Module, depth: int) -> bool:
    """Whether nothing tells a call of `tower` from a run of its embeddings and its first `depth` layers."""
    if type(tower) not in ENCODERS or type(tower.encoder) is not ENCODERS[type(tower)]:
        return False
    unread = [tower.encoder.layers[depth:], tower.post_layernorm, getattr(tower, "head", None)]
    skipped = [module for part in unread if part is not None for module in part.modules()]
    return not any(map(_is_watched, [tower, tower.encoder, *skipped]))


def _is_watched(module: nn.Module) -> bool:
    """Compiled, another forward put in place (accelerate does), or hooks other than transformers' own idle ones."""
    if module._compiled_call_impl is not None or "forward" in module.__dict__:
        return True
    hooks = itertools.chain(*(getattr(module, kind).values() for kind in HOOKS))
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def image_chunks(tower: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """pixel_values [N, 3, S, S] in the pieces that `tower` encodes fastest: whole, on a CPU image by image.

    There the activations of more images fit no cache. A tower that is offloaded takes all at once, to be loaded once.
    """
    on_cpu = next(tower.parameters()).device.type == "cpu"
    return pixel_values.split(1) if on_cpu and not is_captured() else (pixel_values,)


def to_device_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor` on the device of `module`'s weights; as it is where they are offloaded: hooks will move both.

    Weights are buffers where quantised linears keep them so, and out of sight where they are packed.
    """
    weight = next(itertools.chain(module.parameters(), module.buffers()), None)
    return tensor if weight is None or weight.is_meta else tensor.to(weight.device)


def check_pixels(vision: PreTrainedConfig, pixel_values: Tensor) -> None:
    """TypeError or ValueError unless pixel_values is a floating-point tensor [N, 3, S, S] of the tower's size."""
    expected = [vision.num_channels, vision.image_size, vision.image_size]
    shape = f"[images, {', '.join(map(str, expected))}]"
    if not isinstance(pixel_values, Tensor) or not torch.is_floating_point(pixel_values):
        kind = type(pixel_values)
        got = pixel_values.dtype if kind is Tensor else f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")
        raise TypeError(f"pixel_values: expected a floating-point tensor {shape}, got {got}; the processor scales them")
    if (given := list(pixel_values.shape))[1:] != expected or len(given) != 4:
        raise ValueError(f"pixel_values: expected {shape}, got {given}; prepare images with the model's processor")
