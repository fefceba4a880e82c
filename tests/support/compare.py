"""Run ours, the reference in the same dtype and the reference in float64 on the same operands, and apply the rule."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import reference
import stf_kernels

from .rule import assert_within_rule


def leaves_of(tensors: Sequence[Tensor | None], dtype: torch.dtype, *, grad: bool) -> list[Tensor | None]:
    """Fresh copies in dtype with the same strides (an `empty` base would be poisoned: clone keeps dense strides)."""
    return [None if t is None else t.detach().clone().to(dtype).requires_grad_(grad) for t in tensors]


def upstream(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The gradient that is sent back: the same values in every dtype, small enough for sums in fp16."""
    rows = max(1, torch.Size(shape[:-1]).numel())
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(77), dtype=torch.float64) / rows**0.5
    return noise.to(dtype).to(device)


def compare_functions(call: Callable[..., Tensor], tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """call(package, *leaves) of ours against the reference: output and each gradient. Returns our output.

    tensors are rounded to dtype first. Views (a CLS crop) belong inside the call: leaves are their bases.
    """
    runs = [functools.partial(call, package) for package in (stf_kernels, reference, reference)]
    return _compare(runs, tensors, dtype, gradients=True)


def _compare(runs, tensors, dtype, *, gradients, parameters=({}, {}, {})) -> Tensor:
    """(ours, the reference in dtype, in float64), each of fresh leaves; parameters of each that get gradients, too.

    With gradients ours runs without them as well, which is another path: nothing is kept, and an activation overwrites
    its input. No operand may be changed.
    """
    rounded, results = leaves_of(tensors, dtype, grad=False), []
    for run, own, run_dtype in zip(runs, parameters, (dtype, dtype, torch.float64), strict=True):
        leaves = leaves_of(rounded, run_dtype, grad=gradients)
        y = run(*leaves)
        if gradients:
            y.backward(upstream(y.shape, dtype, y.device).to(y.dtype))
        found = {f"operand {i}": None if leaf is None else leaf.grad for i, leaf in enumerate(leaves)}
        results.append((y.detach(), found | {name: parameter.grad for name, parameter in own.items()}))
        if not results[1:]:
            with torch.no_grad():
                again = runs[0](*leaves)
            for i, (leaf, before) in enumerate(zip(leaves, rounded, strict=True)):
                assert leaf is None or torch.equal(leaf.detach(), before), f"operand {i} was changed"
    (y, grads), (same_y, same_grads), (exact_y, exact_grads) = results
    assert_within_rule("output", y, same_y, exact_y)
    assert_within_rule("output where no gradient is wanted", again, same_y, exact_y)
    assert grads.keys() == exact_grads.keys()
    for name in grads if gradients else ():
        assert_within_rule(f"gradient of {name}", grads[name], same_grads[name], exact_grads[name])
    return y


def twins(name: str, *args, dtype: torch.dtype, device="cpu", **options):
    """(our module, the reference in dtype, the reference in float64), one state dict, weights of order one."""
    with torch.device(device):  # drawing 170 million weights on a CPU would be most of a GPU test's time
        same = getattr(reference, name)(*args, **options, device=device).to(dtype)
    with torch.no_grad():
        for parameter in same.parameters():  # biases that matter, outputs of order one
            parameter.mul_(1.5).add_(torch.randn(parameter.shape, device=device).to(dtype), alpha=0.05)
    mine = getattr(stf_kernels, name)(*args, **options, device=device).to(dtype)
    mine.load_state_dict(same.state_dict())
    same.load_state_dict(mine.state_dict())
    return mine, same, copy.deepcopy(same).double()


def compare_modules(modules, blocks: Sequence[Tensor], dtype: torch.dtype, call=None, *, gradients: bool = False):
    """The three of `twins` on blocks: output and, with gradients, those of every block and parameter. Our output."""
    call = call or (lambda module, blocks: module(blocks))
    for module in modules:
        module.zero_grad()
    runs = [lambda *leaves, module=module: call(module, list(leaves)) for module in modules]
    return _compare(runs, blocks, dtype, gradients=gradients, parameters=[dict(m.named_parameters()) for m in modules])


def compare_rows(modules, blocks: Sequence[Tensor], grid: tuple[int, int], order: str = "shuffled") -> None:
    """The three of `twins` into rows of `out`, columns of something wider: the rest of that stays as it is."""
    ours, same, exact = (module.requires_grad_(False) for module in modules)
    expected = exact([block.double() for block in blocks], grid).flatten(0, 1)
    total, device = len(expected) + 12, blocks[0].device
    rows = torch.arange(3, 3 + len(expected)) if order == "forward" else torch.randperm(total)[: len(expected)]
    if order == "strided":
        rows = torch.stack([rows, torch.zeros_like(rows)], 1).flatten()[::2]
    rows, wide = rows.to(device), torch.randn(total, expected.shape[1] + 18, device=device).to(blocks[0].dtype)
    before, out, version = wide.clone(), wide[:, 5:-13], wide._version
    assert ours(blocks, grid, out=out, rows=rows) is out
    assert wide._version > version, "autograd was not told: a kernel writes through a pointer"
    assert_within_rule("indexed rows", out[rows], same(blocks, grid).flatten(0, 1), expected)
    before[rows, 5:-13] = out[rows]
    assert torch.equal(wide, before)
