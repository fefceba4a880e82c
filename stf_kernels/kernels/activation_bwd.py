"""The activation's derivative, with what else the backward wants of the same bytes.

dpre = dy * act'(pre)        may take dy's memory
act  = act(pre)              if WRITE_ACT: the input of the next layer's weight gradient, never kept by the forward
db   = sum over rows of dpre if SUM_ROWS: one partial sum per program and column, added up by the caller in order
"""

import triton
import triton.language as tl

from .activations import activate, activation_derivative


@triton.jit(do_not_specialize=["M"])
def _activation_bwd_kernel(
    dy_ptr, pre_ptr, dpre_ptr, act_ptr, partial_ptr, M, N,
    ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr, WRITE_ACT: tl.constexpr, SUM_ROWS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns a strip of rows. dy, pre, dpre, act contiguous [M, N]; partial fp32 [strips, N]."""
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
