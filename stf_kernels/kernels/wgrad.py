"""The weight gradient of the segmented GEMM: dW = g^T @ A, A never materialised.

    dW[n, s*C + c] = sum over rows m of  g[m, n] * A[m, s*C + c]         g [M, N],  A [M, K],  dW [N, K]

What A's rows are is said in segmented_linear.py. Here the rows are the axis that is summed: a step is BLOCK_K rows of
one image, whose own stride a CLS-cropped batch does not share with its tokens. A tile of dW lies in one segment, so the
block is chosen once, before the loop. A library GEMM has every cropped block copied first.
"""

import triton
import triton.language as tl

from .activations import INTERPRETED
from .segmented_linear import pick, tile_of_program


@triton.jit(do_not_specialize=["images"])
def _segmented_wgrad_kernel(
    block_ptrs, g_ptr, dw_ptr,
    images, N, tokens, x_strides_b, x_strides_t, g_stride, dw_stride,
    NUM_BLOCKS: tl.constexpr, C: tl.constexpr, MERGE_IN: tl.constexpr, GRID_W: tl.constexpr, WHOLE_STEPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program, one tile of dW: BLOCK_M of its N rows by BLOCK_N of one segment's C columns.

    block_ptrs    NUM_BLOCKS pointers to [images, >= tokens, C], last axis contiguous, skipped tokens already behind
    x_strides_*   strides (image, token) in elements, one pair a block
    g_ptr         [images * tokens, N], row stride g_stride
    dw_ptr        [N, NUM_BLOCKS * MERGE_IN^2 * C], row stride dw_stride
    GRID_W        columns of the token grid before merging, 0 without: the loop divides by it
    WHOLE_STEPS   tokens is a multiple of BLOCK_K: no step needs a mask
    """
    SEGMENTS: tl.constexpr = NUM_BLOCKS * MERGE_IN * MERGE_IN
    TILES_C: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_of_program(tl.program_id(0), N, SEGMENTS * TILES_C * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    segment = tile_n // TILES_C
    first_c = (tile_n - segment * TILES_C) * BLOCK_N
    block = segment // (MERGE_IN * MERGE_IN)
    stride_b = pick(x_strides_b, block, NUM_BLOCKS)
    stride_t = pick(x_strides_t, block, NUM_BLOCKS)

    n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = first_c + tl.arange(0, BLOCK_N)
    inside_n = (n < N)[:, None]
    inside_c = (c < C)[None, :]
    k = tl.arange(0, BLOCK_K)
    x_columns = pick(block_ptrs, block, NUM_BLOCKS) + c[None, :]
    x_lanes = x_columns + (k.to(tl.int64) * stride_t)[:, None]
    g_lanes = g_ptr + n[:, None] + (k.to(tl.int64) * g_stride)[None, :]  # transposed as it is loaded
    steps = tl.cdiv(tokens, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    # Offsets are counted on, not computed from the step: that takes a division by a run-time number.
    first_t = 0
    x_image = tl.cast(0, tl.int64)
    g_image = tl.cast(0, tl.int64)
    x_step = tl.cast(stride_t, tl.int64) * BLOCK_K
    g_step = tl.cast(g_stride, tl.int64) * BLOCK_K
    g_images = tl.cast(g_stride, tl.int64) * tokens
    x_offset = x_image
    g_offset = g_image
    for _ in range(images * steps):
        t = first_t + k
        if MERGE_IN > 1:
            OUT_W: tl.constexpr = GRID_W // MERGE_IN
            i = t // OUT_W
            dy = (segment % (MERGE_IN * MERGE_IN)) // MERGE_IN
            token = (i * GRID_W + t - i * OUT_W) * MERGE_IN + dy * GRID_W + segment % MERGE_IN
            x_tile = x_columns + (x_image + token.to(tl.int64) * stride_t)[:, None]
        else:
            x_tile = x_lanes + x_offset
        g_tile = g_lanes + g_offset
        # The next image's rows must not enter, nor what lies behind the last one: 0 * inf is not 0, so both are masked.
        inside_t = t < tokens
        if WHOLE_STEPS and C % BLOCK_N == 0:
            x = tl.load(x_tile)
        else:
            x = tl.load(x_tile, mask=inside_c if WHOLE_STEPS else inside_t[:, None] & inside_c, other=0.0)
        g = tl.load(g_tile, mask=inside_n if WHOLE_STEPS else inside_n & inside_t[None, :], other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            g = g.to(tl.float32)
        acc = tl.dot(g, x, acc, input_precision=INPUT_PRECISION)
        first_t += BLOCK_K
        x_offset += x_step
        g_offset += g_step
        if first_t >= tokens:
            first_t = 0
            x_image += stride_b
            g_image += g_images
            x_offset = x_image
            g_offset = g_image

    dw_tile = dw_ptr + n.to(tl.int64)[:, None] * dw_stride + (segment * C + c)[None, :]
    tl.store(dw_tile, acc.to(dw_ptr.dtype.element_ty), mask=inside_n & inside_c)
