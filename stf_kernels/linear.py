"""When a fused chain may read a layer's parameters instead of calling the layer.

Only where calling it would do nothing else. A LoRA adapter, a quantised layer, a sharded one (DTensor), a layer with a
forward hook is called as the module it is.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import checks

_GLOBAL_HOOKS = (  # torch's own dictionaries, of register_module_forward_hook and the like
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
_FORWARD = nn.Linear.forward  # some tools put their own in the class, for every layer at once


def is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    """The module is of exactly this class, without hooks and without a forward of its own instance."""
    if type(module) is not expected or "forward" in module.__dict__ or any(_GLOBAL_HOOKS):
        return False
    # Spelled out: this is asked of six modules in every call of a projector.
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def parameters_of(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) where reading them is the same as calling the layer, else None."""
    if not is_untouched(module, nn.Linear) or nn.Linear.forward is not _FORWARD:
        return None
    # Straight from the dictionary: attribute look-up on a module is most of the host time of a call.
    parameters = module._parameters
    if "weight" not in parameters or "bias" not in parameters:  # turned into a buffer or a plain attribute
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    if type(weight) not in checks.ORDINARY or (bias is not None and type(bias) not in checks.ORDINARY):
        return None
    return weight, bias


def parameters_of_all(layers: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]] | None:
    """(weights, biases) where all layers can be read instead of called, else None; no biases if no layer has one."""
    weights, biases = [], []
    for layer in layers:
        parameters = parameters_of(layer)
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
