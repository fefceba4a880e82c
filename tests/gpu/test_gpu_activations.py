"""If this fails, the epilogue's activations are not what the formula promises where the hardware approximates.

The interpreter divides and raises to powers exactly; a GPU has an approximate reciprocal and an approximate exp2.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from support.operators import ACTIVATIONS

from reference import functional
from stf_kernels.kernels.activations import activate
from stf_kernels.ops.launch import fast_activation

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["fast", "exact"])
NAMES = pytest.mark.parametrize("name", ACTIVATIONS[1:])


@triton.jit
def _activate(x_ptr, y_ptr, N, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(x) in fp32: as for results of another dtype, which are rounded only afterwards."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    tl.store(y_ptr + i, activate(x, ACTIVATION, FAST), mask=i < N)


def activated(x, name, dtype):
    y = torch.empty_like(x)
    options = {"ACTIVATION": name, "FAST": fast_activation(dtype), "BLOCK": 1024}
    _activate[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), **options)
    return y.double()


@DTYPES
@NAMES
def test_error_before_rounding_over_the_whole_range(name, dtype):
    """Every finite bf16 number, and a fine line where the functions bend: 1e-6, relative where x is above one."""
    every = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(torch.bfloat16).float()
    x = torch.cat([every[every.isfinite()], torch.linspace(-12, 12, 1_000_001, device="cuda")])
    x = x[x.abs() < 1e19]  # beyond, the cube of gelu_tanh is not finite in fp32; see the next test
    expected = functional.activate(x.double(), name)
    error = (activated(x, name, dtype) - expected).abs() / x.double().abs().clamp(min=1)
    assert error.max().item() <= 1e-6, (name, x[error.argmax()].item())


@DTYPES
@NAMES
def test_infinities_nan_and_the_largest_numbers(name, dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 3e38, -3e38], device="cuda")
    expected = functional.activate(x.double(), name)
    torch.testing.assert_close(activated(x, name, dtype), expected, equal_nan=True, rtol=1e-6, atol=1e-30)
