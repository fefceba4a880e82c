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

from .pdl import launch_next, wait_for_previous
from .segmented_linear import accumulate, store_tile, tile_of_program


@triton.jit
def _parts_of_tile(workspace_ptr, tile, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   ROOM: tl.constexpr):  # fmt: skip
    """Addresses of a tile's first part, [ROWS, COLUMNS]; the next one is ROOM elements on."""
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return workspace_ptr + tile.to(tl.int64) * (SPLIT_K * ROOM) + within


@triton.jit
def publish_part(acc, workspace_ptr, tile, split, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 ROOM: tl.constexpr):  # fmt: skip
    """Write one program's part of a tile, fp32 [ROWS, COLUMNS], into its place of the workspace."""
    tl.store(_parts_of_tile(workspace_ptr, tile, SPLIT_K, ROWS, COLUMNS, ROOM) + split * ROOM, acc)


@triton.jit
def is_last_to_arrive(arrived_ptr, SPLIT_K: tl.constexpr):
    """Whether all other programs of the tile have published their parts; the last one finds the counter full."""
    # Every thread's part must be written before one thread announces the arrival of all.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    last = before == SPLIT_K - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit
def sum_of_parts(workspace_ptr, tile, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 ROOM: tl.constexpr):  # fmt: skip
    """The tile: its parts added in the order of the splits, whoever came first."""
    parts = _parts_of_tile(workspace_ptr, tile, SPLIT_K, ROWS, COLUMNS, ROOM)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for s in range(SPLIT_K):
        # .cg: from L2, where the other programs' parts are
        total += tl.load(parts + s * ROOM, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["M", "y_rows"])
def _segmented_linear_split_k_fwd_kernel(
    block_ptrs, w_ptr, bias_ptr, y_ptr, pre_ptr, rows_ptr, workspace_ptr, arrived_ptr,
    M, N, tokens, grid_w, grid_h, x_strides_b, x_strides_t, w_stride_n, y_stride, y_rows,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, GATHER: tl.constexpr, UNIFORM_STRIDES: tl.constexpr,
    STORE: tl.constexpr, MERGE: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLIT_K). workspace fp32 [tiles, SPLIT_K, BLOCK_M, BLOCK_N], arrived int32 [tiles] of zeros;
    the rest as in _segmented_linear_fwd_kernel."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    steps: tl.constexpr = NUM_BLOCKS * GATHER * GATHER * ((C + BLOCK_K - 1) // BLOCK_K)
    wait_for_previous(PDL)
    launch_next(PDL)
    acc = accumulate(
        block_ptrs, w_ptr, tile_m, tile_n, steps * split // SPLIT_K, steps * (split + 1) // SPLIT_K,
        M, N, tokens, grid_w, x_strides_b, x_strides_t, w_stride_n,
        NUM_BLOCKS, C, GATHER, UNIFORM_STRIDES, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip

    ROOM: tl.constexpr = BLOCK_M * BLOCK_N
    publish_part(acc, workspace_ptr, tile, split, SPLIT_K, BLOCK_M, BLOCK_N, ROOM)
    if is_last_to_arrive(arrived_ptr + tile, SPLIT_K):
        total = sum_of_parts(workspace_ptr, tile, SPLIT_K, BLOCK_M, BLOCK_N, ROOM)
        store_tile(
            total, bias_ptr, y_ptr, pre_ptr, rows_ptr, tile_m * BLOCK_M, tile_n * BLOCK_N,
            M, N, tokens, grid_w, grid_h, y_stride, y_rows,
            STORE, MERGE, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
