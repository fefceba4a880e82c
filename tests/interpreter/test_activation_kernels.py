"""If this fails, an activation or its derivative is off somewhere: fast GELU, the tails, infinities, NaN."""

import math

import pytest
import torch
from support.operators import ACTIVATIONS

from reference.functional import activate
from stf_kernels.configs import GemmConfig
from stf_kernels.ops.launch import run_activation_bwd, run_stage
from stf_kernels.ops.segments import Stage

NAMES = pytest.mark.parametrize("name", ACTIVATIONS[1:])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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
@DTYPES
def test_error_along_a_line(name, dtype):
    """1e-6 of the formula, in units of x where that is above one, and half a unit in the last place of 16 bits; sums of
    columns are fp32, without that rounding. In fp32 the unit is the value, and derivatives keep their digits."""
    x = LINE.to(dtype).unique()
    y, dy = exact_pair(x, name)
    found, (slope, again, total) = activated(x, name), derivative(x, name)
    ulp, tiny = 0.0, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    of_value = of_slope = 1e-6 * x.double().abs().clamp(min=1)
    if dtype == torch.float32:
        of_value, of_slope = 1e-6 * y.abs().clamp(min=1), 3e-7
    else:
        ulp = 1.0001 * torch.finfo(dtype).eps / 2
    for mine, exact, most, unit in (
        (found, y, of_value, ulp),
        (again, y, of_value, ulp),
        (slope, dy, of_slope, ulp),
        (total, dy, of_slope, 0.0),
    ):
        assert bool(((mine.double() - exact).abs() <= most + unit * exact.abs() + tiny).all())


@NAMES
@DTYPES
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
    alone, *nothing = run_activation_bwd(dy, pre, "gelu", overwrite=False, write_act=False, sum_rows=False)
    assert nothing == [None, None]
    dpre, act, total = run_activation_bwd(dy, pre, "gelu", overwrite=overwrite, write_act=True, sum_rows=True)
    assert torch.equal(dpre, alone)
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
