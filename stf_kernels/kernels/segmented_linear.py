"""The one GEMM of this library: y = act(A @ W^T + b), A never materialised.

The K axis of A is cut into segments of C columns, and each segment says where its rows live:

    concat   segment s            -> block s,  token t
    merge    segment s = (dy, dx) -> block 0,  token (r*i + dy) * grid_w + (r*j + dx)

A segment is (block, dy, dx) here, so concat is r = 1, merge is one block, and a plain linear layer is both.
Row m of A is (image b, row t of `tokens`); for a merge t = (i, j) on the grid divided by r.

The store side places its rows as well:

    STORE "rows"     y[m, n]
    STORE "merge"    y[image, (i//r, j//r), ((i%r)*r + j%r) * N + n]    the merged layout, for the next GEMM
    STORE "scatter"  y[rows[m], n]                                       e.g. the image positions of inputs_embeds

W is [N, K], K = blocks * r * r * C, as nn.Linear keeps it. All address products are int64.
"""

import triton
import triton.language as tl
from triton.knobs import runtime as _runtime

from .activations import activate
from .pdl import launch_next, wait_for_previous

# The interpreter multiplies the bit patterns of bf16 operands: there they are widened before the product.
INTERPRETED: tl.constexpr = tl.constexpr(bool(_runtime.interpret))


@triton.jit
def _pick(values, index, COUNT: tl.constexpr):
    """values[index] for a run-time index: a chain of selects, which keeps the loop pipelined."""
    picked = values[0]
    for i in tl.static_range(1, COUNT):
        picked = tl.where(index == i, values[i], picked)
    return picked


@triton.jit
def tile_of_program(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program id -> (tile row, tile column), GROUP_M tile rows at a time so that W tiles stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_group = GROUP_M * tiles_n
    group = program // per_group
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program - group * per_group
    return first + within % height, within // height


@triton.jit
def accumulate(
    block_ptrs, w_ptr, tile_m, tile_n, step_begin, step_end,
    M, N, tokens, grid_w, x_strides_b, x_strides_t, w_stride_n,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, GATHER: tl.constexpr, UNIFORM_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One fp32 tile of A @ W^T over the K steps [step_begin, step_end); a step is BLOCK_K columns of one segment."""
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    WINDOW: tl.constexpr = GATHER * GATHER

    # Rows and columns past the end read the last one: their results are never stored, and the loads need no mask.
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    image = m // tokens
    token = m - image * tokens
    if GATHER > 1:
        out_w = grid_w // GATHER
        i = token // out_w
        token = (i * grid_w + token - i * out_w) * GATHER

    k = tl.arange(0, BLOCK_K)
    w_tile = w_ptr + n.to(tl.int64)[None, :] * w_stride_n + k[:, None]
    row_offset = image.to(tl.int64) * x_strides_b[0] + token.to(tl.int64) * x_strides_t[0]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for step in range(step_begin, step_end):
        segment = step // STEPS
        # Not `% C`: a remainder of the loop variable hides the alignment and with it the asynchronous copies.
        column = (step - segment * STEPS) * BLOCK_K
        block = segment // WINDOW
        base = _pick(block_ptrs, block, NUM_BLOCKS) + column
        if not UNIFORM_STRIDES:
            row_offset = image.to(tl.int64) * _pick(x_strides_b, block, NUM_BLOCKS)
            row_offset += token.to(tl.int64) * _pick(x_strides_t, block, NUM_BLOCKS)
        if GATHER > 1:
            dy = (segment % WINDOW) // GATHER
            dx = segment % GATHER
            stride_t = x_strides_t[0] if UNIFORM_STRIDES else _pick(x_strides_t, block, NUM_BLOCKS)
            base += (dy * grid_w + dx).to(tl.int64) * stride_t
        a_tile = base + row_offset[:, None] + k[None, :]
        w_step = w_tile + (segment * C + column)
        if C % BLOCK_K == 0:
            a = tl.load(a_tile)
            w = tl.load(w_step)
        else:
            inside = k < C - column
            a = tl.load(a_tile, mask=inside[None, :], other=0.0)
            w = tl.load(w_step, mask=inside[:, None], other=0.0)
        if INTERPRETED:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def store_tile(
    acc, bias_ptr, y_ptr, pre_ptr, rows_ptr, first_m, first_n, M, N, tokens, grid_w, grid_h, y_stride, y_rows,
    STORE: tl.constexpr, MERGE: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of the tile whose corner is (first_m, first_n), BLOCK_M x BLOCK_N: bias, optional copy of the
    pre-activation to pre[m, n], activation, placement of the rows."""
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    inside_m = m < M
    inside_n = n < N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if SAVE_PRE:
        pre_tile = pre_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(pre_tile, acc.to(pre_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])
    acc = activate(acc, ACTIVATION, FAST_ACTIVATION)

    if STORE == "merge":
        image = m // tokens
        token = m - image * tokens
        i = token // grid_w
        j = token - i * grid_w
        out_h = grid_h // MERGE
        out_w = grid_w // MERGE
        # A truncated grid leaves rows and columns that belong to no window.
        inside_m = inside_m & (i < out_h * MERGE) & (j < out_w * MERGE)
        row = image.to(tl.int64) * (out_h * out_w) + (i // MERGE) * out_w + j // MERGE
        window = (i % MERGE) * MERGE + j % MERGE
        row_offset = row * y_stride + window.to(tl.int64) * N
    elif STORE == "scatter":
        row = tl.load(rows_ptr + m, mask=inside_m, other=0)
        inside_m = inside_m & (row >= 0) & (row < y_rows)  # a wrong index must not write into foreign memory
        row_offset = row * y_stride
    else:
        tl.static_assert(STORE == "rows")
        row_offset = m.to(tl.int64) * y_stride
    y_tile = y_ptr + row_offset[:, None] + n[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["M", "y_rows"])
def _segmented_linear_fwd_kernel(
    block_ptrs, w_ptr, bias_ptr, y_ptr, pre_ptr, rows_ptr,
    M, N, tokens, grid_w, grid_h, x_strides_b, x_strides_t, w_stride_n, y_stride, y_rows,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, GATHER: tl.constexpr, UNIFORM_STRIDES: tl.constexpr,
    STORE: tl.constexpr, MERGE: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program, one BLOCK_M x BLOCK_N tile of y.

    block_ptrs    NUM_BLOCKS pointers to [B, >= tokens, C], last axis contiguous, skipped tokens already behind
    x_strides_*   strides (image, token) in elements: one pair if UNIFORM_STRIDES, else one per block
    w_ptr         [N, NUM_BLOCKS * GATHER^2 * C], row stride w_stride_n;  bias_ptr [N]
    y_ptr         row stride y_stride, last axis contiguous;  pre_ptr [M, N] contiguous if SAVE_PRE
    rows_ptr      int64 [M], each in [0, y_rows), if STORE is "scatter"
    M = B * tokens;  grid_h, grid_w: the token grid before merging;  PDL: see pdl.py
    """
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    steps: tl.constexpr = NUM_BLOCKS * GATHER * GATHER * ((C + BLOCK_K - 1) // BLOCK_K)
    wait_for_previous(PDL)
    launch_next(PDL)
    acc = accumulate(
        block_ptrs, w_ptr, tile_m, tile_n, 0, steps,
        M, N, tokens, grid_w, x_strides_b, x_strides_t, w_stride_n,
        NUM_BLOCKS, C, GATHER, UNIFORM_STRIDES, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip
    store_tile(
        acc, bias_ptr, y_ptr, pre_ptr, rows_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N,
        M, N, tokens, grid_w, grid_h, y_stride, y_rows,
        STORE, MERGE, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
