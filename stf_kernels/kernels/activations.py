"""Activations of the epilogue on fp32 values, their derivatives, and the kernel of the backward that applies them.

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
_INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
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


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """d act(x) / dx. 1 - sigmoid(x) is sigmoid(-x): the difference has no digits left from x = 16 on."""
    if ACTIVATION == "gelu":
        return _normal_cdf(x, FAST) + x * _INV_SQRT_2PI * tl.exp2(-0.5 * x * x * _LOG2E)
    elif ACTIVATION == "gelu_tanh":
        u = (x + 0.044715 * x * x * x) * _TWO_SQRT_2_OVER_PI
        gate = _sigmoid(u, FAST)
        return gate + x * gate * _sigmoid(-u, FAST) * _TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x)
    elif ACTIVATION == "silu":
        gate = _sigmoid(x, FAST)
        return gate + x * gate * _sigmoid(-x, FAST)
    else:
        tl.static_assert(ACTIVATION == "none")
        return x * 0.0 + 1.0


@triton.jit(do_not_specialize=["M"])
def _activation_bwd_kernel(
    dy_ptr, pre_ptr, dpre_ptr, act_ptr, partial_ptr, M, N,
    ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr, WRITE_ACT: tl.constexpr, SUM_ROWS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Everything that the backward wants of a pre-activation, read once. A program owns a strip of rows.

    dpre = dy * act'(pre)        may take dy's memory
    act  = act(pre)              if WRITE_ACT: the input of the next layer's weight gradient, never kept by the forward
    db   = sum over rows of dpre if SUM_ROWS: one partial sum per program and column, added up by the caller in order

    dy, pre, dpre, act contiguous [M, N]; partial fp32 [strips, N].
    """
    strip = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, ROWS_PER_PROGRAM, BLOCK_M):
        m = strip * ROWS_PER_PROGRAM + first + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & inside_n[None, :]
        offset = m.to(tl.int64)[:, None] * N + n[None, :]
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        pre = tl.load(pre_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dpre = dy * activation_derivative(pre, ACTIVATION, FAST_ACTIVATION)
        tl.store(dpre_ptr + offset, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        if WRITE_ACT:
            act = activate(pre, ACTIVATION, FAST_ACTIVATION)
            tl.store(act_ptr + offset, act.to(act_ptr.dtype.element_ty), mask=inside)
        if SUM_ROWS:
            total += tl.sum(tl.where(inside, dpre, 0.0), axis=0)
    if SUM_ROWS:
        tl.store(partial_ptr + strip.to(tl.int64) * N + n, total, mask=inside_n)
