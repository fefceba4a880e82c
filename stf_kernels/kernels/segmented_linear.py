"""The one GEMM of this library: y = act(A @ W^T + b), A never materialised.

The K axis of A is cut into segments of C columns, and each segment says where its rows live:

    concatenated     segment s            -> block s,  token t
    merged on load   segment s = (dy, dx) -> block 0,  token (r*i + dy) * grid_w + (r*j + dx)       r = MERGE_IN

A segment is (block, dy, dx) here, so a concatenation is r = 1, a merge is one block, and a plain linear layer is both.
Row m of A is (image b, row t of `tokens`); for a merge t = (i, j) on the grid divided by r.

The store side places its rows as well:

    dense            y[m, n]
    merged on store  y[image, (i//r, j//r), ((i%r)*r + j%r) * N + n]    the next GEMM's dense operand; r = MERGE_OUT
    indexed          y[rows[m], n]                                       e.g. the image positions of inputs_embeds

W is [N, K], K = blocks * r * r * C, as nn.Linear keeps it. All address products are int64.

Read `_segmented_linear_fwd_kernel` first, at the end: it finds its tile, accumulates it and stores it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activations import INTERPRETED, activate
from .split_k import is_last_to_arrive, publish_part, sum_of_parts


@triton.jit
def begin_dependent(PDL: tl.constexpr):
    """Stand before the first access to memory of a programmatic dependent launch (NVIDIA from sm_90 on). It may start
    before the kernel ahead of it has ended: wait for all of that one's stores, and let the next kernel start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """values[index] for a run-time index: a chain of selects, which keeps the loop pipelined."""
    picked = values[0]
    for i in tl.static_range(1, COUNT):
        picked = tl.where(index == i, values[i], picked)
    return picked


@triton.jit
def bytes_ahead(block_ptrs, base_ptr, index, COUNT: tl.constexpr):
    """From base_ptr to block_ptrs[index]. Differences do not change in a loop, so registers hold them; a
    choice among the pointers themselves is a chain of constant loads in every step (sm_90)."""
    ahead = block_ptrs[0].to(tl.int64) - base_ptr.to(tl.int64)
    for i in tl.static_range(1, COUNT):
        ahead = tl.where(index == i, block_ptrs[i].to(tl.int64) - base_ptr.to(tl.int64), ahead)
    return ahead


@triton.jit
def tile_of_program(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program id -> (tile row, tile column), about GROUP_M tile rows at a time so that W tiles stay in L2. The groups
    are of equal height: each reads all of W, and a ninth row alone would read it for itself."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    groups = tl.maximum((tiles_m + GROUP_M // 2) // GROUP_M, 1)
    rows = tl.cdiv(tiles_m, groups)
    per_group = rows * tiles_n
    group = program // per_group
    first = group * rows
    height = tl.minimum(tiles_m - first, rows)
    within = program - group * per_group
    return first + within % height, within // height


@triton.jit
def accumulate(
    block_ptrs, w_ptr, tile_m, tile_n, step_begin, step_end,
    M, N, tokens, grid_w, x_strides_b, x_strides_t, w_stride_n,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, ALIGNMENT: tl.constexpr, MERGE_IN: tl.constexpr,
    UNIFORM_STRIDES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One fp32 tile of A @ W^T over the K steps [step_begin, step_end); a step is BLOCK_K columns of one segment."""
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    WINDOW: tl.constexpr = MERGE_IN * MERGE_IN
    ITEMSIZE: tl.constexpr = block_ptrs[0].dtype.element_ty.primitive_bitwidth // 8

    # Rows and columns past the end read the last one: their results are never stored, and the loads need no mask.
    m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    image = m // tokens
    token = m - image * tokens
    if MERGE_IN > 1:
        out_w = grid_w // MERGE_IN
        i = token // out_w
        token = (i * grid_w + token - i * out_w) * MERGE_IN

    k = tl.arange(0, BLOCK_K)
    w_tile = w_ptr + n.to(tl.int64)[None, :] * w_stride_n + k[:, None]
    row_offset = image.to(tl.int64) * x_strides_b[0] + token.to(tl.int64) * x_strides_t[0]
    a_tile = block_ptrs[0] + row_offset[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for step in range(step_begin, step_end):
        segment = step // STEPS
        # Not `% C`: a remainder of the loop variable hides the alignment and with it the asynchronous copies.
        column = (step - segment * STEPS) * BLOCK_K
        block = segment // WINDOW
        offset = tl.cast(column, tl.int64)
        if NUM_BLOCKS > 1 and ALIGNMENT > 0:
            ahead = bytes_ahead(block_ptrs, block_ptrs[0], block, NUM_BLOCKS) // ITEMSIZE
            offset += tl.multiple_of(ahead, ALIGNMENT)
        if MERGE_IN > 1:
            dy = (segment % WINDOW) // MERGE_IN
            offset += (dy * grid_w + segment % MERGE_IN).to(tl.int64) * x_strides_t[0]
        if UNIFORM_STRIDES and (NUM_BLOCKS == 1 or ALIGNMENT > 0):
            a_step = a_tile + offset
        else:
            if not UNIFORM_STRIDES:
                row_offset = image.to(tl.int64) * pick(x_strides_b, block, NUM_BLOCKS)
                row_offset += token.to(tl.int64) * pick(x_strides_t, block, NUM_BLOCKS)
            base = block_ptrs[0] if ALIGNMENT > 0 else pick(block_ptrs, block, NUM_BLOCKS)
            a_step = base + offset + row_offset[:, None] + k[None, :]
        w_step = w_tile + (segment * C + column)
        if C % BLOCK_K == 0:
            a = tl.load(a_step)
            w = tl.load(w_step)
        else:
            inside = k < C - column
            a = tl.load(a_step, mask=inside[None, :], other=0.0)
            w = tl.load(w_step, mask=inside[:, None], other=0.0)
        if INTERPRETED:  # which multiplies the bit patterns of bf16 operands
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(a, w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def store_tile(
    acc, bias_ptr, y_ptr, pre_ptr, rows_ptr, first_m, first_n, M, N, tokens, grid_h, grid_w, y_stride, y_rows,
    MERGE_OUT: tl.constexpr, INDEX_ROWS: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
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

    if MERGE_OUT > 1:
        image = m // tokens
        token = m - image * tokens
        i = token // grid_w
        j = token - i * grid_w
        out_h = grid_h // MERGE_OUT
        out_w = grid_w // MERGE_OUT
        # A truncated grid leaves rows and columns that belong to no window.
        inside_m = inside_m & (i < out_h * MERGE_OUT) & (j < out_w * MERGE_OUT)
        row = image.to(tl.int64) * (out_h * out_w) + (i // MERGE_OUT) * out_w + j // MERGE_OUT
        window = (i % MERGE_OUT) * MERGE_OUT + j % MERGE_OUT
        row_offset = row * y_stride + window.to(tl.int64) * N
    elif INDEX_ROWS:
        row = tl.load(rows_ptr + m, mask=inside_m, other=0)
        inside_m = inside_m & (row >= 0) & (row < y_rows)  # a wrong index must not write into foreign memory
        row_offset = row * y_stride
    else:
        row_offset = m.to(tl.int64) * y_stride
    y_tile = y_ptr + row_offset[:, None] + n[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["M", "y_rows"])
def _segmented_linear_fwd_kernel(
    block_ptrs, w_ptr, bias_ptr, y_ptr, pre_ptr, rows_ptr, workspace_ptr, arrived_ptr,
    M, N, tokens, grid_h, grid_w, y_stride, y_rows, x_strides_b, x_strides_t, w_stride_n,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, ALIGNMENT: tl.constexpr, MERGE_IN: tl.constexpr,
    UNIFORM_STRIDES: tl.constexpr,
    MERGE_OUT: tl.constexpr, INDEX_ROWS: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLIT_K); one program, one BLOCK_M x BLOCK_N tile of y, or its share of the K steps (split_k.py).

    block_ptrs    NUM_BLOCKS pointers to [B, >= tokens, C], last axis contiguous, skipped tokens already behind;
                  their distances are multiples of ALIGNMENT elements; 0: every block by its own pointer, for AMD, where
                  a load is 32 bits from the pointer that it is written with, and another allocation may be farther
    x_strides_*   strides (image, token) in elements: one pair if UNIFORM_STRIDES, else one per block
    w_ptr         [N, NUM_BLOCKS * MERGE_IN^2 * C], row stride w_stride_n;  bias_ptr [N]
    y_ptr         row stride y_stride, last axis contiguous;  pre_ptr [M, N] contiguous if SAVE_PRE
    rows_ptr      int64 [M], each in [0, y_rows), if INDEX_ROWS
    workspace_ptr fp32 [tiles, SPLIT_K, BLOCK_M, BLOCK_N], arrived_ptr int32 [tiles] of zeros, if SPLIT_K > 1
    M = B * tokens;  grid_h, grid_w: the token grid before merging;  PDL: see begin_dependent
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    STEPS: tl.constexpr = NUM_BLOCKS * MERGE_IN * MERGE_IN * ((C + BLOCK_K - 1) // BLOCK_K)
    ROOM: tl.constexpr = BLOCK_M * BLOCK_N
    begin_dependent(PDL)
    acc = accumulate(
        block_ptrs, w_ptr, tile_m, tile_n, STEPS * split // SPLIT_K, STEPS * (split + 1) // SPLIT_K,
        M, N, tokens, grid_w, x_strides_b, x_strides_t, w_stride_n,
        NUM_BLOCKS, C, ALIGNMENT, MERGE_IN, UNIFORM_STRIDES, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip
    last = True
    if SPLIT_K > 1:
        publish_part(acc, workspace_ptr, tile, split, SPLIT_K, ROOM)
        last = is_last_to_arrive(arrived_ptr + tile, SPLIT_K)
    if last:
        if SPLIT_K > 1:
            acc = sum_of_parts(workspace_ptr, tile, SPLIT_K, BLOCK_M, BLOCK_N, ROOM)
        store_tile(
            acc, bias_ptr, y_ptr, pre_ptr, rows_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N,
            M, N, tokens, grid_h, grid_w, y_stride, y_rows,
            MERGE_OUT, INDEX_ROWS, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
