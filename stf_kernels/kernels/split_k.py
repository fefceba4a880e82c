"""The segmented GEMM with its K axis shared out: for few rows, whose tiles alone do not fill the GPU.

    program (tile, split) sums its part of the K steps and writes it to a workspace;
    the last of a tile's programs to arrive adds the parts up in the order of the splits, and stores the tile.

NVIDIA only: there the barrier and the releasing atomic of one thread publish the stores of all. AMD's barrier does not
wait for the stores of other wavefronts, so a part might be read before it is written; configurations refuse it there.

No atomic ever adds a value, so the sum has one order and a run the same bits as the run before. The counters of
arrival return to zero by themselves.
"""

import triton
import triton.language as tl

from .segmented_linear import accumulate, store_tile, tile_of_program


@triton.jit(do_not_specialize=["M", "y_rows"])
def _segmented_linear_split_k_fwd_kernel(
    block_ptrs, w_ptr, bias_ptr, y_ptr, pre_ptr, rows_ptr, workspace_ptr, arrived_ptr,
    M, N, tokens, grid_w, grid_h, x_strides_b, x_strides_t, w_stride_n, y_stride, y_rows,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, GATHER: tl.constexpr, UNIFORM_STRIDES: tl.constexpr,
    STORE: tl.constexpr, MERGE: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLIT_K). workspace fp32 [tiles, SPLIT_K, BLOCK_M, BLOCK_N], arrived int32 [tiles] of zeros;
    the rest as in _segmented_linear_fwd_kernel."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    steps: tl.constexpr = NUM_BLOCKS * GATHER * GATHER * ((C + BLOCK_K - 1) // BLOCK_K)
    acc = accumulate(
        block_ptrs, w_ptr, tile_m, tile_n, steps * split // SPLIT_K, steps * (split + 1) // SPLIT_K,
        M, N, tokens, grid_w, x_strides_b, x_strides_t, w_stride_n,
        NUM_BLOCKS, C, GATHER, UNIFORM_STRIDES, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip

    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    parts = workspace_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + within
    tl.store(parts + split * (BLOCK_M * BLOCK_N), acc)
    # Every thread's part must be written before one thread announces the arrival of all.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
    if before == SPLIT_K - 1:
        tl.store(arrived_ptr + tile, 0)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for s in range(SPLIT_K):
            # .cg: from L2, where the other programs' parts are
            total += tl.load(parts + s * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
        store_tile(
            total, bias_ptr, y_ptr, pre_ptr, rows_ptr, tile_m, tile_n, M, N, tokens, grid_w, grid_h, y_stride, y_rows,
            STORE, MERGE, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
