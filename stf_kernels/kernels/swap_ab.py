"""A linear layer over one operand with A and B swapped, for few rows: y^T = act(W @ X^T + b).

A warpgroup product takes its M axis in 64s and its N axis in 8s. One image is 144 rows: in place of M they fill two
tiles of 128, 44 % of it padding; in place of N they are 128 + 16 and nothing is padding. So the rows of W take the
place of M here, and a tile of y is BLOCK_N features by BLOCK_M + TAIL_M rows, with an accumulator for each part.

With one tile of rows the features alone must fill the GPU: the 16384 of STF's first layer are 128 tiles of 128, the
4096 of its second only 32, where SPLIT_K shares the K axis out (split_k.py).

Hopper and later only: tiles come through descriptors, as in tma.py, which fill in zeros past every end.
"""

import triton
import triton.language as tl

from .activations import INTERPRETED
from .segmented_linear import begin_dependent, store_tile, tile_of_program
from .split_k import is_last_to_arrive, publish_part, sum_of_parts


@triton.jit(do_not_specialize=["M", "y_rows"])
def _linear_swap_ab_fwd_kernel(
    main_desc, tail_desc, w_desc, bias_ptr, y_ptr, pre_ptr, rows_ptr, workspace_ptr, arrived_ptr,
    M, N, tokens, grid_h, grid_w, y_stride, y_rows,
    C: tl.constexpr,
    MERGE_OUT: tl.constexpr, INDEX_ROWS: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TAIL_M: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, SPLIT_K), a tile BLOCK_M + TAIL_M rows by BLOCK_N features.

    main_desc, tail_desc  X [M, C] in boxes of [BLOCK_M, BLOCK_K] and [TAIL_M, BLOCK_K]
    w_desc                [N, C] in boxes of [BLOCK_N, BLOCK_K]
    workspace             fp32 [2 * tiles, SPLIT_K, BLOCK_N, BLOCK_M], arrived int32 [tiles]: only where SPLIT_K > 1
    The rest as in _segmented_linear_fwd_kernel.
    """
    STEPS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tile, M, N, BLOCK_M + TAIL_M, BLOCK_N, GROUP_M)
    m = tile_m * (BLOCK_M + TAIL_M)
    n = tile_n * BLOCK_N
    main = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    tail = tl.zeros((BLOCK_N, TAIL_M), dtype=tl.float32)

    begin_dependent(PDL)
    for step in range(STEPS * split // SPLIT_K, STEPS * (split + 1) // SPLIT_K):
        column = step * BLOCK_K
        w = w_desc.load([n, column])
        x_main = main_desc.load([m, column])
        x_tail = tail_desc.load([m + BLOCK_M, column])
        if INTERPRETED:
            w = w.to(tl.float32)
            x_main = x_main.to(tl.float32)
            x_tail = x_tail.to(tl.float32)
        main = tl.dot(w, x_main.T, main, input_precision=INPUT_PRECISION)
        tail = tl.dot(w, x_tail.T, tail, input_precision=INPUT_PRECISION)

    last = True
    if SPLIT_K > 1:
        publish_part(main, workspace_ptr, 2 * tile, split, SPLIT_K, BLOCK_N * BLOCK_M)
        publish_part(tail, workspace_ptr, 2 * tile + 1, split, SPLIT_K, BLOCK_N * BLOCK_M)
        last = is_last_to_arrive(arrived_ptr + tile, SPLIT_K)
    if last:
        if SPLIT_K > 1:
            main = sum_of_parts(workspace_ptr, 2 * tile, SPLIT_K, BLOCK_N, BLOCK_M, BLOCK_N * BLOCK_M)
            tail = sum_of_parts(workspace_ptr, 2 * tile + 1, SPLIT_K, BLOCK_N, TAIL_M, BLOCK_N * BLOCK_M)
        store_tile(
            tl.trans(main), bias_ptr, y_ptr, pre_ptr, rows_ptr, m, n, M, N, tokens, grid_h, grid_w, y_stride, y_rows,
            MERGE_OUT, INDEX_ROWS, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_tile(
            tl.trans(tail), bias_ptr, y_ptr, pre_ptr, rows_ptr, m + BLOCK_M, n,
            M, N, tokens, grid_h, grid_w, y_stride, y_rows,
            MERGE_OUT, INDEX_ROWS, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, TAIL_M, BLOCK_N,
        )  # fmt: skip
