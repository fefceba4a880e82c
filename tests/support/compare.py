"""Run ours, the reference in the same dtype and the reference in float64 on the same operands, and apply the rule."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .rule import assert_within_rule


def leaves_of(tensors: Sequence[Tensor | None], dtype: torch.dtype, *, grad: bool) -> list[Tensor | None]:
    """Fresh copies in dtype with the same strides (an `empty` base would be poisoned: clone keeps dense strides)."""
    return [None if t is None else t.detach().clone().to(dtype).requires_grad_(grad) for t in tensors]


def upstream(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The gradient that is sent back: the same values in every dtype, small enough for sums in fp16."""
    rows = max(1, torch.Size(shape[:-1]).numel())
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(77), dtype=torch.float64) / rows**0.5
    return noise.to(dtype).to(device)


def compare_functions(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    gradients: bool = False,
) -> Tensor:
    """ours(*leaves) against theirs(*leaves): output, each gradient, and no leaf changed. Returns our output.

    tensors are rounded to dtype first. Views (a CLS crop) belong inside the callables: leaves are their bases.
    """
    rounded = leaves_of(tensors, dtype, grad=False)
    results = []
    for function, run_dtype in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        leaves = leaves_of(rounded, run_dtype, grad=gradients)
        y = function(*leaves)
        if gradients:
            y.backward(upstream(y.shape, dtype, y.device).to(y.dtype))
        results.append((y.detach(), [None if leaf is None else leaf.grad for leaf in leaves]))
        if function is ours:
            for i, (leaf, before) in enumerate(zip(leaves, rounded, strict=True)):
                assert leaf is None or torch.equal(leaf.detach(), before), f"operand {i} was changed"
    (y, grads), (same_y, same_grads), (exact_y, exact_grads) = results
    assert_within_rule("output", y, same_y, exact_y)
    if gradients:
        for i, triple in enumerate(zip(grads, same_grads, exact_grads, strict=True)):
            assert_within_rule(f"gradient of operand {i}", *triple)
    return y


def twins(ours: type[nn.Module], theirs: type[nn.Module], *args, dtype: torch.dtype, device="cpu", **options):
    """(our module, the reference in dtype, the reference in float64), one state dict, weights of order one."""
    with torch.device(device):  # drawing 170 million weights on a CPU would be most of a GPU test's time
        same = theirs(*args, **options).to(dtype)
    with torch.no_grad():
        for parameter in same.parameters():  # biases that matter, outputs of order one
            parameter.mul_(1.5).add_(torch.randn(parameter.shape, device=device).to(dtype), alpha=0.05)
    mine = ours(*args, **options, dtype=dtype, device=device)
    mine.load_state_dict(same.state_dict())
    return mine, same, copy.deepcopy(same).double()


def compare_modules(modules, blocks: Sequence[Tensor], dtype: torch.dtype, call=None, *, gradients: bool = False):
    """The three of `twins` on blocks: output and, with gradients, those of every block and parameter. Our output."""
    call = call or (lambda module, blocks: module(blocks))
    rounded = leaves_of(blocks, dtype, grad=False)
    results = []
    for module, run_dtype in zip(modules, (dtype, dtype, torch.float64), strict=True):
        leaves = leaves_of(rounded, run_dtype, grad=gradients)
        y = call(module, leaves)
        if gradients:
            module.zero_grad()
            y.backward(upstream(y.shape, dtype, y.device).to(y.dtype))
        found = {f"blocks[{i}]": leaf.grad for i, leaf in enumerate(leaves)}
        found |= {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append((y.detach(), found))
        if module is modules[0]:
            for leaf, before in zip(leaves, rounded, strict=True):
                assert torch.equal(leaf.detach(), before), "a block was changed"
    (y, grads), (same_y, same_grads), (exact_y, exact_grads) = results
    assert_within_rule("output", y, same_y, exact_y)
    if gradients:
        assert grads.keys() == exact_grads.keys()
        for name in grads:
            assert_within_rule(f"gradient of {name}", grads[name], same_grads[name], exact_grads[name])
    return y
