"""dW = g^T @ A of a chain's first stage, whose A is never materialised: each segment into its own columns of dW.

library    one GEMM a segment (cuBLAS, MKL) through `out=`, a slice of dW with its own row stride. It wants one stride
           for all rows: a segment of a CLS-cropped batch, or of a gathered one, is copied first, one at a time. Not on
           the CPU in fp32 and fp64: there it is one product an image.
segmented  kernels/segmented_wgrad.py, which reads the rows where they are. For operands that the library copies.

Which is faster on a GPU is for the device's table to say (stages "concat_wgrad" and "merge_wgrad"); where it is silent
the library serves, because the kernel has not run on hardware yet. use_backend("triton") asks for the kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, tuning
from ..tuning import GemmConfig
from . import launch, torch_path
from .direct_launch import launch as start
from .forms import input_precision
from .stage import Stage


def first_weight_grad(g: Tensor, blocks: Sequence[Tensor], shape: Sequence[int], stage: Stage) -> Tensor:
    """g [M, N], rows in the order of the stage's GEMM; blocks [B, T, C] each -> dW of `shape` [N, K]."""
    config = _configuration(g, blocks, shape, stage)
    if config is not None:
        try:
            return launch_segmented_wgrad(g, blocks, stage, config)
        except launch.does_not_run() as error:
            tuning.reject(g.device, g.dtype, config, error, wgrad=True)
    return by_library(g, blocks, shape, stage)


def _configuration(g: Tensor, blocks: Sequence[Tensor], shape: Sequence[int], stage: Stage) -> GemmConfig | None:
    """The segmented kernel's, or None for the library."""
    copied = stage.gather > 1 or not all(map(has_one_row_stride, blocks))
    if not copied or not backend.use_triton(g.device, g.dtype):
        return None
    may_decline = backend.current_backend() == "auto"
    kind = stage.kind(len(blocks))
    return tuning.choose_wgrad(g.device, kind, g.dtype, g.shape[0], *shape, may_decline=may_decline)


def has_one_row_stride(block: Tensor) -> bool:
    """Whether [B, T, C] is [B*T, C] without a copy."""
    batch, tokens = block.shape[:2]
    return batch <= 1 or tokens <= 1 or block.stride(0) == tokens * block.stride(1)


def by_library(g: Tensor, blocks: Sequence[Tensor], shape: Sequence[int], stage: Stage) -> Tensor:
    c = blocks[0].shape[-1]
    dw = g.new_empty(shape)
    for s, segment in enumerate(stage.segments(blocks)):
        target = dw[:, s * c : (s + 1) * c]
        if stage.gather > 1 or not _product_of_each_image(segment):
            torch.mm(g.t(), segment.flatten(0, -2), out=target)
            continue
        # No copy at all: one product an image, summed. In 16 bit every sum would be rounded, so there it is a copy.
        for b, g_image in enumerate(g.view(segment.shape[0], segment.shape[1], -1)):
            torch.addmm(target, g_image.t(), segment[b], beta=min(b, 1), out=target)
    return dw


def _product_of_each_image(segment: Tensor) -> bool:
    """A CLS-cropped batch in fp32 or fp64 on the CPU.

    A GPU would read and write dW once an image; there copying one segment is cheaper.
    """
    return not has_one_row_stride(segment) and segment.dtype in torch_path.WIDE and segment.device.type == "cpu"


def launch_segmented_wgrad(g: Tensor, blocks: Sequence[Tensor], stage: Stage, config: GemmConfig) -> Tensor:
    """The Triton launcher -> dW [N, len(blocks) * gather^2 * C] in the dtype of g.

    config's block_m are rows of dW, block_n columns of one segment, block_k rows of g a step.
    """
    from ..kernels.segmented_wgrad import _segmented_wgrad_kernel

    g, blocks = launch.with_contiguous_last(g), [launch.with_contiguous_last(block) for block in blocks]
    x = blocks[0]
    images, tokens, c, n = x.shape[0], stage.tokens(x.shape), x.shape[-1], g.shape[1]
    segments = stage.num_segments(blocks)
    dtype = torch.float32 if backend.interpreting() else g.dtype  # as in launch.py
    dw = torch.empty((n, segments * c), device=g.device, dtype=dtype)
    tiles = -(-n // config.block_m) * segments * -(-c // config.block_n)
    if tiles:
        with launch.on_device(g.device):
            start(
                _segmented_wgrad_kernel, (tiles,),
                (
                    tuple(blocks), g, dw, images, n, tokens, stage.grid[1],
                    tuple(block.stride(0) for block in blocks), tuple(block.stride(1) for block in blocks),
                    g.stride(0), dw.stride(0),
                ),
                wgrad_constants(stage, len(blocks), c, tokens, config),
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return dw.to(g.dtype)


def wgrad_constants(stage: Stage, num_blocks: int, c: int, tokens: int, config: GemmConfig) -> dict[str, object]:
    """The kernel's constexpr parameters: what a compiled specialisation is made for."""
    return {
        "NUM_BLOCKS": num_blocks,
        "C": c,
        "GATHER": stage.gather,
        "WHOLE_STEPS": tokens % config.block_k == 0,
        "INPUT_PRECISION": input_precision(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
