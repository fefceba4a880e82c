"""If this fails, the segmented kernel computes something else than the reference: rows, columns, strides, epilogue."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import (
    ACTIVATIONS,
    CHANGES,
    GRIDS,
    LAYOUTS,
    SHAPES,
    changed,
    concat_operands,
    concat_pair,
    merge_operands,
    merge_pair,
)

import reference
import stf_kernels
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_concat_linear(shape, dtype):
    count, batch, tokens, channels, n, bias = shape
    operands = concat_operands(count, batch, tokens, channels, n, bias=bias)
    compare_functions(*concat_pair(count, activation="gelu"), operands, dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_activations(activation, gradients, dtype):
    pair = concat_pair(2, crop=1, skip_tokens=1, activation=activation)
    compare_functions(*pair, concat_operands(2, 2, 14, 16, 40), dtype, gradients=gradients)


@DTYPES
@pytest.mark.parametrize(("merge_size", "grid"), GRIDS.values(), ids=GRIDS)
def test_spatial_merge_linear(merge_size, grid, dtype):
    pair = merge_pair(1, grid=grid, merge_size=merge_size, skip_tokens=1, activation="silu", truncate=True)
    operands = merge_operands(2, 2 + grid[0] * grid[1], 9, 35, merge_size, bias=False)
    compare_functions(*pair, operands, dtype, gradients=True)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_a_concatenation(change, dtype):
    pair = changed(concat_pair(3, activation="gelu"), change)
    compare_functions(*pair, concat_operands(3, 2, 9, 33, 24), dtype, gradients=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_a_merge(layout):
    pair = changed(merge_pair(grid=(4, 6), skip_tokens=1), lambda w, b, x: (w, b, layout(x)))
    compare_functions(*pair, merge_operands(2, 25, 12, 40, 2), torch.float32, gradients=True)


def test_a_gradient_of_stride_zero():
    """What `y.sum().backward()` sends back."""
    weight, bias, *blocks = (t.requires_grad_() for t in concat_operands(2, 2, 5, 8, 12))
    found, exact = (
        torch.autograd.grad(
            package.concat_linear(blocks, weight, bias, activation="gelu").sum(), (weight, bias, *blocks)
        )
        for package in (stf_kernels, reference)
    )
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("change", ["blocks-interleaved", "each-block-another"])
def test_blocks_by_their_own_pointers(change, monkeypatch):
    """As on AMD, where a block may lie farther from another one than a load reaches; alike and unlike strides."""
    monkeypatch.setattr(torch.version, "hip", "7")
    pair = changed(concat_pair(3, activation="gelu"), CHANGES[change])
    compare_functions(*pair, concat_operands(3, 2, 9, 16, 40), torch.float32)


def test_a_sign_that_is_still_to_be_applied():
    """Of an operand, a bias, the gradient that comes back, and the rows that are written."""
    x, bias, g, minus = torch.randn(1, 6, 8, requires_grad=True), torch.randn(8), torch.randn(1, 6, 8), torch._neg_view
    eye = torch.eye(8)
    assert torch.equal(stf_kernels.concat_linear([minus(x)], eye), -x)
    assert torch.equal(stf_kernels.concat_linear([0 * x], eye, minus(bias))[0, 0], -bias)
    y = stf_kernels.concat_linear([x], eye, activation="silu")
    assert torch.equal(*(torch.autograd.grad(y, x, sent, retain_graph=True)[0] for sent in (minus(g), -g)))
    for dtype in (torch.float32, torch.float16):
        out, operands = torch.zeros(7, 8, dtype=dtype), ([x.detach().to(dtype)], eye.to(dtype))
        run_stage(*operands, None, Stage(), out=minus(out), rows=torch.arange(6))
        assert torch.equal(out[:6], -operands[0][0][0])
