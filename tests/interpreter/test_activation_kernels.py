"""If this fails, an activation is off somewhere: fast GELU, the tails, infinities, NaN."""

import math

import pytest
import torch
from support.operators import ACTIVATIONS
from triton.runtime.errors import InterpreterError

from reference.functional import activate
from stf_kernels.configs import GemmConfig
from stf_kernels.ops.launch import run_stage
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


@NAMES
@DTYPES
def test_error_along_a_line(name, dtype):
    """1e-6 of the formula, in units of x where that is above one, and half a unit in the last place of 16 bits; in 32
    a rounding or two, which the fast formula does not keep."""
    x = LINE.to(dtype).unique()
    exact, tiny = activate(x.double(), name), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wide = dtype == torch.float32
    most = 1.5e-7 * exact.abs().clamp(min=1) if wide else 1e-6 * x.double().abs().clamp(min=1)
    ulp = 0.0 if wide else 1.0001 * torch.finfo(dtype).eps / 2
    assert bool(((activated(x, name).double() - exact).abs() <= most + ulp * exact.abs() + tiny).all())


def test_an_unknown_name_is_no_identity():
    with pytest.raises(InterpreterError, match="AssertionError"):
        activated(LINE, "relu")


@NAMES
@DTYPES
def test_infinities_and_nan(name, dtype):
    """Values are torch's in float64: its fp32 GELU makes NaN of +inf on CPUs with AVX-512."""
    x = SPECIAL.to(dtype)
    expected = activate(x.double(), name).to(dtype)
    torch.testing.assert_close(activated(x, name), expected, equal_nan=True, rtol=1e-2, atol=1e-30)
