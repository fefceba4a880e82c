"""A GEMM with a trap: the remainder of the loop variable in the K loop hides the alignment of the loads."""

import triton
import triton.language as tl


@triton.jit
def gemm_with_remainder(
    x_ptr, w_ptr, y_ptr, K, x_stride, w_stride, y_stride,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRAP: tl.constexpr,
):  # fmt: skip
    """y = x @ w^T, the columns of x with period C: a bare `k % C` if TRAP, else `tl.multiple_of` around it."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        column = (k % C if TRAP else tl.multiple_of(k % C, BLOCK_K)) + lane
        x = tl.load(x_ptr + m[:, None] * x_stride + column[None, :])
        w = tl.load(w_ptr + n[None, :] * w_stride + (k + lane)[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + m[:, None] * y_stride + n[None, :], acc.to(y_ptr.dtype.element_ty))
