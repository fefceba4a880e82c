"""If this fails, an activation or its derivative is off somewhere: fast GELU, the tails, infinities, NaN."""

import math

import pytest
import torch
from support.operators import ACTIVATIONS
from support.rule import assert_within_rule

from reference.functional import activate
from stf_kernels.configs import GemmConfig
from stf_kernels.ops.launch import run_activation_bwd, run_stage
from stf_kernels.ops.segments import Stage

NAMES = pytest.mark.parametrize("name", ACTIVATIONS[1:])
SPECIAL = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 3e38, -3e38, 1e-30, -1e-40])
LINE = torch.cat([torch.linspace(-12, 12, 1201), torch.logspace(-8, 2, 60), -torch.logspace(-8, 2, 60)])


def activated(x, name):
    """act(x) as the epilogue computes it: x arrives as the pre-activation through a bias, with a zero product."""
    n = x.numel()
    y, pre = run_stage(
        [torch.zeros(1, 1, 16, dtype=x.dtype)], torch.zeros(n, 16, dtype=x.dtype), x, Stage(name),
        GemmConfig(16, 1024, 16), save_pre=True,
    )  # fmt: skip
    assert torch.equal(pre.flatten(), x) or x.isnan().any()
    return y.flatten()


def derivative(x, name):
    dpre, act, total = run_activation_bwd(
        torch.ones(1, x.numel(), dtype=x.dtype), x[None], name, overwrite=False, write_act=True, sum_rows=True
    )
    return dpre.flatten(), act.flatten(), total


def exact_pair(x, name):
    x = x.double().requires_grad_()
    y = activate(x, name)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@NAMES
def test_exact_in_fp32(name):
    """Error below 1e-6, in units of the value where that is above one; derivatives by the rule."""
    y, dy = exact_pair(LINE, name)
    leaf = LINE.clone().requires_grad_()
    torchs = torch.autograd.grad(activate(leaf, name).sum(), leaf)[0]
    found, (slope, again, total) = activated(LINE, name), derivative(LINE, name)
    for mine in (found, again):
        assert bool(((mine - y).abs() <= 1e-6 * y.abs().clamp(min=1)).all())
    for mine in (slope, total):
        assert_within_rule("derivative", mine, torchs, dy)
        assert (mine - dy).abs().max() <= 3e-7  # 1e-6 in torch's tanh GELU at 5: 1 - tanh^2 has no digits


@NAMES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fast_in_sixteen_bits(name, dtype):
    """Half a unit in the last place, and 1e-6 for the fast formula."""
    x = LINE.to(dtype).unique()
    y, dy = exact_pair(x, name)
    found, (slope, again, total) = activated(x, name), derivative(x, name)
    ulp = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for mine, exact in ((found, y), (slope, dy), (again, y)):
        allowed = ulp * exact.abs() * 1.0001 + tiny + 1e-6 * x.double().abs().clamp(min=1)
        assert bool(((mine.double() - exact).abs() <= allowed).all())
    # the sums are fp32: the formula itself, without the rounding to 16 bits
    assert bool(((total.double() - dy).abs() <= 1e-6 * x.double().abs().clamp(min=1)).all())


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities_nan_and_derivatives_far_out(name, dtype):
    """Values are torch's in float64 (its fp32 GELU makes NaN of +inf on CPUs with AVX-512); so are derivatives where
    torch's are finite."""
    x = SPECIAL.to(dtype)
    expected = activate(x.double(), name).to(dtype)
    torch.testing.assert_close(activated(x, name), expected, equal_nan=True, rtol=1e-2, atol=1e-30)
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(activate(leaf, name).sum(), leaf)[0]
    finite = slope.isfinite()
    torch.testing.assert_close(derivative(x, name)[0][finite], slope[finite], rtol=1e-2, atol=1e-30)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 129), (129, 5), (300, 130), (0, 4)])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_tiles(m, n, overwrite, dtype):
    """Tails of rows and columns, the column sums over several strips, dy's memory reused or left alone."""
    dy, pre = torch.randn(m, n).to(dtype), torch.randn(m, n).to(dtype)
    before, kept = dy.clone(), pre.clone()
    dpre, act, total = run_activation_bwd(dy, pre, "gelu", overwrite=overwrite, write_act=True, sum_rows=True)
    y, slope = exact_pair(pre, "gelu")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dpre.double(), before.double() * slope, rtol=eps, atol=4 * eps)
    torch.testing.assert_close(act.double(), y, rtol=eps, atol=4 * eps)
    torch.testing.assert_close(total.double(), (before.double() * slope).sum(0), rtol=1e-5, atol=1e-4)
    assert total.dtype == torch.float32
    assert torch.equal(pre, kept)
    if not overwrite:
        assert torch.equal(dy, before)
    elif dtype == torch.float32 and m:
        assert dpre.data_ptr() == dy.data_ptr()


def test_only_what_is_asked_for():
    dpre, act, total = run_activation_bwd(
        torch.ones(2, 3), torch.randn(2, 3), "silu", overwrite=False, write_act=False, sum_rows=False
    )
    assert dpre.shape == (2, 3)
    assert act is None
    assert total is None
