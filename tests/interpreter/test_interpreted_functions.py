"""If this fails, the kernels compute something else than the reference, alone (rows, columns, strides, epilogue) or in
a chain (merged stores, dense reads, indexed rows), or their backward does."""

import pytest
import torch
from support.modules import CASES as MODULES
from support.modules import compare_case
from support.operators import CASES, EACH_FUNCTION

import reference
import stf_kernels
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

ALL = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", ALL, ids=str)


@DTYPES
@EACH_FUNCTION
def test_functions(case, dtype):
    case.compare(dtype)


# In 16 bits their gradients are so few numbers each that torch's error may be small by luck.
TINY = ("r3-no-bias-silu", "thirty-two-blocks")
RUNS = [(name, dtype) for name in MODULES for dtype in ALL if dtype == torch.float32 or name not in TINY]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_modules(name, dtype):
    compare_case(MODULES[name], dtype)


def test_a_gradient_of_stride_zero():
    """What `y.sum().backward()` sends back."""
    weight, bias, *blocks = leaves = [
        torch.randn(*s, requires_grad=True) for s in ((12, 16), (12,), (2, 5, 8), (2, 5, 8))
    ]
    found, exact = (
        torch.autograd.grad(package.concat_linear(blocks, weight, bias, activation="gelu").sum(), leaves)
        for package in (stf_kernels, reference)
    )
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("case", ["columns-one-short", "blocks-interleaved", "each-block-another"])
def test_blocks_by_their_own_pointers(case, monkeypatch):
    """As on AMD, where a block may lie farther from another one than a load reaches; alike and unlike strides."""
    monkeypatch.setattr(torch.version, "hip", "7")
    CASES[case].compare(torch.float32)


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


def test_saved_tensors_that_come_back_in_another_layout():
    """As a hook that compresses or offloads them may return them: same values, other strides."""
    module = stf_kernels.CompactTokenProjector(2, 8, 20)
    blocks, parameters = [torch.randn(2, 16, 8) for _ in range(2)], list(module.parameters())
    expected = torch.autograd.grad(module(blocks).square().sum(), parameters)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().mT.contiguous(), lambda t: t.mT):
        y = module(blocks)
    for mine, exact in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(mine, exact)
