"""When a fused chain may read a layer's parameters instead of calling the layer.

Only where calling it would do nothing else: exactly nn.Linear, ordinary parameters, no hooks, no forward of its own.
A LoRA adapter, a quantised layer, a sharded one (DTensor), a layer with a forward hook is called as the module it is.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import checks

_GLOBAL_HOOKS = (  # torch's own dictionaries, of register_module_forward_hook and the like
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
_ORDINARY = (Tensor, nn.Parameter)
_FORWARD = nn.Linear.forward  # some tools put their own in the class, for every layer at once


def is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    """The module is of exactly this class, without hooks and without a forward of its own instance."""
    if type(module) is not expected or "forward" in module.__dict__ or any(_GLOBAL_HOOKS):
        return False
    # Spelled out: this is asked of six modules in every call of a projector.
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) where reading them is the same as calling the module, else None."""
    if not is_untouched(module, nn.Linear) or nn.Linear.forward is not _FORWARD:
        return None
    # Straight from the dictionary: attribute look-up on a module is most of the host time of a call.
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:  # turned into a buffer or a plain attribute
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    if type(weight) not in _ORDINARY or (bias is not None and type(bias) not in _ORDINARY):
        return None
    return weight, bias


def plain_layers(layers: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]] | None:
    """(weights, biases) where all layers can be read instead of called, else None; no biases if no layer has one."""
    weights, biases = [], []
    for layer in layers:
        parameters = plain_parameters(layer)
        if parameters is None:
            return None
        weights.append(parameters[0])
        if parameters[1] is not None:
            biases.append(parameters[1])
    return None if biases and len(biases) < len(weights) else (weights, biases)


def call_linear(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """Call a layer that is not to be read; a sharded parameter without whatever gathers it gets a clear error."""
    if is_untouched(module, nn.Linear):
        for kind in ("weight", "bias"):
            checks.refuse_dtensor(f"{kind} ({name})", getattr(module, kind))
    return module(x)


class FrozenRelayout:
    """A relaid-out copy of a weight, kept while that is safe: the weight frozen, its module in eval mode.

    `p.data.copy_()` changes a parameter without a trace, so nothing is kept of one that may still be trained, and
    `clear` is for whoever changes a frozen one by hand.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._kept: tuple | None = None  # (key, weak reference to the weight, its copy), replaced as one

    def get(self, weight: Tensor, relayout, training: bool) -> Tensor:
        if torch.compiler.is_compiling() or training or weight.requires_grad or weight.is_inference():
            return relayout(weight)
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return relayout(weight)  # a copy made in a capture holds nothing before the graph's first replay
        # By stream: one may not read what another has yet to write.
        stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
        key = (weight.data_ptr(), weight._version, stream)
        kept = self._kept
        # The same address and version may be another tensor in freed memory: the tensor itself must be the same.
        if kept is None or kept[0] != key or kept[1]() is not weight:
            # A copy made under inference_mode could not take part in a gradient later.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = (key, weakref.ref(weight), relayout(weight))
        return kept[2]

    def __deepcopy__(self, memo: dict) -> "FrozenRelayout":
        return FrozenRelayout()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.clear()
