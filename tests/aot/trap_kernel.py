"""A GEMM over two blocks with traps that the check of the machine code must see."""

import triton
import triton.language as tl


@triton.jit
def gemm_with_traps(
    x_ptrs, w_ptr, y_ptr, K, x_stride, w_stride, y_stride,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRAP: tl.constexpr,
):  # fmt: skip
    """y = concat(x, -1) @ w^T.

    remainder  a bare `k % C` hides the alignment of the loads
    pointer    a choice among pointers in the loop, where their distances would stay in registers
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        column = (k % C if TRAP == "remainder" else tl.multiple_of(k % C, BLOCK_K)) + lane
        base = x_ptrs[0]
        if TRAP == "pointer":
            for i in tl.static_range(1, 8):
                base = tl.where(k // C == i, x_ptrs[i], base)
        x = tl.load(base + m[:, None] * x_stride + column[None, :])
        w = tl.load(w_ptr + n[None, :] * w_stride + (k + lane)[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + m[:, None] * y_stride + n[None, :], acc.to(y_ptr.dtype.element_ty))
