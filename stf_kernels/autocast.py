"""What autocast does to the operands of nn.Linear, done to those of a fused operator.

autocast casts an fp32 parameter once in a region and keeps the cast until the outermost region ends: a module that is
called again in it reads the 16-bit weights. That cache has no door in Python but the operators that autocast knows.
So a product without columns is asked for, `mm(weight, [K, 0])`, and a dispatch mode takes the operand that arrives:
torch's own cast with its own place in the autograd graph, which torch also lets go of. The product is never computed.
For the projector's four weights that is 20 us of host time; to cast them anew moves 1.0 GB at 7B sizes.

Biases, blocks and what autocast does not keep (other dtypes, no gradient, no leaf) are cast on each call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def cast_operands(
    blocks: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Under autocast, all operands in the dtype that nn.Linear would compute in; float64 stays, as it does there."""
    device_type = blocks[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or blocks[0].dtype == torch.float64:
        return blocks, weights, biases
    dtype = torch.get_autocast_dtype(device_type)
    return _cast(blocks, dtype), _cast(_kept_casts(weights, dtype), dtype), _cast(biases, dtype)


def _cast(operands: Sequence, dtype: torch.dtype) -> list:
    """What is no tensor stays, for the checks that follow to name."""
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in operands]


def _kept_casts(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The weights, each replaced by the cast that autocast keeps, if it keeps one."""
    if torch.compiler.is_compiling() or not torch.is_autocast_cache_enabled() or _is_transformed():
        return weights
    kept = [i for i, weight in enumerate(weights) if _is_kept(weight)]
    if not kept:
        return weights
    weights, empty = list(weights), [weights[i].new_empty((weights[i].shape[1], 0), dtype=dtype) for i in kept]
    with _Operands() as seen:
        for i, columns in zip(kept, empty, strict=True):
            torch.mm(weights[i], columns)
    for i, cast in zip(kept, seen.first, strict=True):
        weights[i] = cast
    return weights


def _is_kept(weight: object) -> bool:
    """By autocast's own rule, and a matrix."""
    ordinary = type(weight) in (Tensor, torch.nn.Parameter) and weight.ndim == 2 and weight.device.type != "meta"
    return ordinary and weight.dtype == torch.float32 and weight.requires_grad and weight.is_leaf


def _is_transformed() -> bool:
    """Inside a transform of torch.func a dispatch mode meets tensors of another level."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Operands(TorchDispatchMode):
    """Notes the first operand of every mm, and computes none."""

    def __init__(self) -> None:
        super().__init__()
        self.first: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.mm.default:
            return func(*args, **(kwargs or {}))
        self.first.append(args[0])
        return args[1].new_empty((args[0].shape[0], 0))
