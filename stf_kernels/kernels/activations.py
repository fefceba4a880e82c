"""Activations of the epilogue on fp32 values. The backward's derivatives are torch's own (ops/backward.py).

    gelu       x * Phi(x),  Phi the normal distribution function            (exact: erf)
    gelu_tanh  x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
    silu       x * sigmoid(x)

Constants stand on the right of a product: the interpreter needs the tensor first.
Infinities and NaN come out as torch's do: gelu(-inf) is NaN because -inf * 0 is.
"""

import triton
import triton.language as tl
from triton.knobs import runtime as _runtime

INTERPRETED: tl.constexpr = tl.constexpr(bool(_runtime.interpret))
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
_TWO_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x for x >= 1: one instruction of NVIDIA's, where a division has eight for a range that is not met here."""
    if FAST == 2:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    return _reciprocal(1.0 + tl.exp2(-x * _LOG2E), FAST)


@triton.jit
def _normal_cdf(x, FAST: tl.constexpr):
    """Phi(x). FAST by Abramowitz-Stegun 7.1.26: a third of the instructions of `tl.erf`, |error| < 3e-7.

    1 - erf(z) = (a1 t + ... + a5 t^5) exp(-z^2),  t = 1 / (1 + p z),  z = |x| / sqrt(2)

    Phi's half is in the a's, sqrt(2) in p, log2(e) / 2 in the exponent.
    """
    if FAST:
        t = _reciprocal(tl.abs(x) * 0.2316418882 + 1.0, FAST)
        poly = t * (t * (t * (t * (t * 0.5307027145 - 0.7265760135) + 0.7107068705) - 0.142248368) + 0.127414796)
        half_tail = poly * tl.exp2(x * x * -0.7213475204)
        return tl.where(x < 0, half_tail, 1.0 - half_tail)
    else:
        return 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act(x). FAST 1 admits an error of 1e-6, far under 16-bit rounding, so it is 0 for fp32 outputs; 2: on NVIDIA."""
    if ACTIVATION == "gelu":
        return x * _normal_cdf(x, FAST)
    elif ACTIVATION == "gelu_tanh":
        return x * _sigmoid((x + 0.044715 * x * x * x) * _TWO_SQRT_2_OVER_PI, FAST)
    elif ACTIVATION == "silu":
        return x * _sigmoid(x, FAST)
    else:
        tl.static_assert(ACTIVATION == "none")
        return x
