"""If this fails, the chain of kernels (merged stores, dense reads, indexed rows) or its backward is wrong."""

import pytest
import torch
from support.compare import compare_modules, compare_rows, twins

import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

CASES = {
    "defaults": ({}, (4, 4)),
    "class-token-wide": ({"skip_tokens": 1}, (2, 6)),
    "truncated": ({"truncate": True, "skip_tokens": 1, "activation": "silu"}, (5, 7)),
    "r3-no-bias": ({"merge_size": 3, "bias": False}, (3, 6)),
    "r1-tanh": ({"merge_size": 1, "activation": "gelu_tanh"}, (3, 5)),
    "r4": ({"merge_size": 4, "stf_hidden_dim": 40}, (4, 8)),
    "no-activation": ({"activation": None}, (4, 6)),
    "widths": ({"mbtf_hidden_dim": 33, "stf_hidden_dim": 37}, (4, 4)),
}


@DTYPES
@pytest.mark.parametrize(("options", "grid"), CASES.values(), ids=CASES)
def test_projector(options, grid, dtype):
    modules = twins("CompactTokenProjector", 3, 17, 20, **{"stf_hidden_dim": 40, **options}, dtype=dtype)
    blocks = [torch.randn(2, grid[0] * grid[1] + options.get("skip_tokens", 0), 17) for _ in range(3)]
    compare_modules(modules, blocks, dtype, lambda module, x: module(x, grid), gradients=True)


@DTYPES
def test_the_children(dtype):
    fusion = twins("MultiBlockTokenFusion", 3, 8, skip_tokens=1, dtype=dtype)
    compare_modules(fusion, [torch.randn(2, 12, 8) for _ in range(3)], dtype, gradients=True)
    merging = twins("SpatialTokenFusion", 8, 20, hidden_dim=40, dtype=dtype)
    x = [torch.randn(2, 24, 8)]
    compare_modules(merging, x, dtype, lambda module, blocks: module(blocks[0], (4, 6)), gradients=True)


@DTYPES
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch, dtype):
    modules = twins("CompactTokenProjector", 2, 8, 20, dtype=dtype)
    compare_modules(modules, [torch.randn(batch, 16, 8) for _ in range(2)], dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("order", ["shuffled", "strided"])
def test_indexed_rows(order, dtype):
    modules = twins("CompactTokenProjector", 2, 8, 20, dtype=dtype)
    compare_rows(modules, [torch.randn(2, 16, 8).to(dtype) for _ in range(2)], (4, 4), order)


def test_saved_tensors_that_come_back_in_another_layout():
    """As a hook that compresses or offloads them may return them: same values, other strides."""
    module = stf_kernels.CompactTokenProjector(2, 8, 20)
    blocks, parameters = [torch.randn(2, 16, 8) for _ in range(2)], list(module.parameters())
    expected = torch.autograd.grad(module(blocks).square().sum(), parameters)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().mT.contiguous(), lambda t: t.mT):
        y = module(blocks)
    for mine, exact in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(mine, exact)
