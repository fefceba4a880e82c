"""The segmented GEMM with tiles fetched by the tensor memory accelerator of Hopper and later (TMA).

A descriptor names a strided array to the hardware, which then copies whole boxes of it without address arithmetic in
the program. One descriptor serves all blocks: from the lowest of their addresses on, block s lies some multiple of
UNIT bytes ahead, so that

    x[offset, image, token, c]    strides (UNIT, stride of an image, stride of a token, 1)

names every row of every block, and leaves out skipped tokens by its base address alone. A box must not cross from one
image into the next: it holds BOX_M rows, and a tile is BLOCK_M / BOX_M boxes with an accumulator each. Rows of one
pitch throughout (a dense operand) are one image of M tokens and one box a tile.

Hopper and later only. The host makes the descriptors; ops/tma.py says when they can be made.
"""

import triton
import triton.language as tl

from .activations import INTERPRETED
from .segmented_linear import begin_dependent, bytes_ahead, store_tile, tile_of_program


@triton.jit
def _box_product(x_desc, w, acc, offset, m, image_rows, column, INPUT_PRECISION: tl.constexpr):
    """acc + x[a box of rows from m on] @ w; rows past the last image are zeros that the hardware fills in."""
    image = m // image_rows
    x = x_desc.load([offset, image, m - image * image_rows, column]).reshape(acc.shape[0], w.shape[0])
    if INTERPRETED:
        x = x.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=INPUT_PRECISION)


@triton.jit(do_not_specialize=["M", "image_rows", "y_rows"])
def _segmented_linear_tma_fwd_kernel(
    x_desc, w_desc, base_ptr, block_ptrs, bias_ptr, y_ptr, pre_ptr, rows_ptr,
    M, N, tokens, grid_h, grid_w, y_stride, y_rows, image_rows,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr,
    MERGE_OUT: tl.constexpr, INDEX_ROWS: tl.constexpr, ACTIVATION: tl.constexpr, FAST_ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, INPUT_PRECISION: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BOX_M: tl.constexpr,
):  # fmt: skip
    """One program, one BLOCK_M x BLOCK_N tile of y; C is a multiple of BLOCK_K.

    x_desc      [offset, image, row of the image, column of C] in boxes of [1, 1, BOX_M, BLOCK_K]
    w_desc      [N, NUM_BLOCKS * C] in boxes of [BLOCK_N, BLOCK_K]
    block_ptrs  NUM_BLOCKS pointers, each a multiple of UNIT bytes after base_ptr, where x_desc begins
    image_rows  rows of an image as x_desc counts them: a multiple of BOX_M, or M
    The rest as in _segmented_linear_fwd_kernel, without a merge on load.
    """
    BOXES: tl.constexpr = BLOCK_M // BOX_M
    tl.static_assert(BOXES <= 4)
    STEPS: tl.constexpr = C // BLOCK_K
    tile_m, tile_n = tile_of_program(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M
    n = tile_n * BLOCK_N
    acc_0 = tl.zeros((BOX_M, BLOCK_N), dtype=tl.float32)
    acc_1 = acc_0
    acc_2 = acc_0
    acc_3 = acc_0

    begin_dependent(PDL)
    for step in range(NUM_BLOCKS * STEPS):
        block = step // STEPS
        column = (step - block * STEPS) * BLOCK_K
        offset = (bytes_ahead(block_ptrs, base_ptr, block, NUM_BLOCKS) // UNIT).to(tl.int32)
        w = w_desc.load([n, block * C + column]).T
        if INTERPRETED:
            w = w.to(tl.float32)
        acc_0 = _box_product(x_desc, w, acc_0, offset, m, image_rows, column, INPUT_PRECISION)
        if BOXES > 1:
            acc_1 = _box_product(x_desc, w, acc_1, offset, m + BOX_M, image_rows, column, INPUT_PRECISION)
        if BOXES > 2:
            acc_2 = _box_product(x_desc, w, acc_2, offset, m + 2 * BOX_M, image_rows, column, INPUT_PRECISION)
        if BOXES > 3:
            acc_3 = _box_product(x_desc, w, acc_3, offset, m + 3 * BOX_M, image_rows, column, INPUT_PRECISION)

    accs = (acc_0, acc_1, acc_2, acc_3)
    for box in tl.static_range(BOXES):
        store_tile(
            accs[box], bias_ptr, y_ptr, pre_ptr, rows_ptr, m + box * BOX_M, n,
            M, N, tokens, grid_h, grid_w, y_stride, y_rows,
            MERGE_OUT, INDEX_ROWS, ACTIVATION, FAST_ACTIVATION, HAS_BIAS, SAVE_PRE, BOX_M, BLOCK_N,
        )  # fmt: skip
