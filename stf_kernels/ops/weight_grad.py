"""dW = g^T @ A of a chain's first stage, whose A the forward has not kept.

library    one GEMM (cuBLAS, MKL) over A, which is made again
kernel     kernels/wgrad.py reads cropped or merged blocks where they are; where the device's table or a selection
           names it ("concat_wgrad", ...) or use_backend("triton") asks for it
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import configs
from ..backend import interpreting, on_device
from ..configs import GemmConfig
from . import first_use, launch, torch_path
from .segments import Stage


def first_weight_grad(g: Tensor, blocks: Sequence[Tensor], shape: Sequence[int], stage: Stage, path: str) -> Tensor:
    """g [M, N], rows in the order of the stage's GEMM; blocks [B, T, C] each -> dW of `shape` [N, K].

    path: see backend.resolve.
    """
    if path == "torch" or (stage.merge_in == 1 and all(map(has_one_row_stride, blocks))):
        return by_library(g, blocks, stage)
    kind, (n, k) = stage.kind(len(blocks)) + "_wgrad", shape
    product = functools.partial(product_of, g, blocks, shape, stage)
    measure = functools.partial(first_use.measure, product)
    config = launch.chosen(g.device, configs.Gemm(kind, g.dtype, n, k, g.shape[0]), path == "triton", measure)
    if config is not None:
        try:
            return launch_wgrad(g, blocks, stage, config)
        except launch.does_not_run() as error:
            launch.reject(g.device, g.dtype, config, error, wgrad=True)
    return by_library(g, blocks, stage)


def has_one_row_stride(block: Tensor) -> bool:
    """Whether [B, T, C] is [B*T, C] without a copy: the kernel is for other blocks."""
    batch, tokens = block.shape[:2]
    return batch <= 1 or tokens <= 1 or block.stride(0) == tokens * block.stride(1)


def by_library(g: Tensor, blocks: Sequence[Tensor], stage: Stage) -> Tensor:
    return torch.mm(g.t(), torch_path.gathered(blocks, stage).flatten(0, 1))


def launch_wgrad(g: Tensor, blocks: Sequence[Tensor], stage: Stage, config: GemmConfig) -> Tensor:
    """The Triton launcher -> dW [N, len(blocks) * merge_in^2 * C] in the dtype of g.

    config's block_m are rows of dW, block_n columns of one segment, block_k rows of g a step.
    """
    g, blocks = launch.with_contiguous_last(g), [launch.with_contiguous_last(block) for block in blocks]
    dtype = torch.float32 if interpreting() else g.dtype  # as in launch.py
    columns = stage.num_segments(blocks) * blocks[0].shape[-1]
    dw = torch.empty((g.shape[1], columns), device=g.device, dtype=dtype)
    if dw.numel():
        kernel, grid, operands, sizes, constants = wgrad_arguments(config, (blocks, g, dw), stage)
        with on_device(g.device):
            kernel[grid](*operands, *sizes, **constants, **config.compiler_options())
    return dw.to(g.dtype)


def product_of(g: Tensor, blocks: Sequence[Tensor], shape: Sequence[int], stage: Stage) -> first_use.Product:
    """dW as it is tried and timed at first use."""
    g, blocks = launch.with_contiguous_last(g), [launch.with_contiguous_last(block) for block in blocks]

    def arguments(config: GemmConfig, results: tuple[Tensor, ...]) -> tuple:
        return wgrad_arguments(config, (blocks, g, *results), stage)

    def exact(rows: Tensor) -> tuple[Tensor, ...]:
        transposed = g[:, rows].t().double()
        return (torch.cat([transposed @ s.flatten(0, -2).double() for s in stage.segments(blocks)], -1),)

    def drawn() -> first_use.Product:
        return product_of(first_use.draw(g), [first_use.draw(block) for block in blocks], shape, stage)

    def library() -> tuple[Tensor, ...]:
        return (by_library(g, blocks, stage),)

    return first_use.Product(g.device, shape[1], g.t(), lambda: (g.new_empty(shape),), arguments, library, exact, drawn)


def wgrad_arguments(config: GemmConfig, tensors: tuple, stage: Stage) -> tuple:
    """(kernel, grid, its tensors, its sizes, its constants), as launch.ARGUMENTS has them; tensors: blocks, g, dw."""
    from ..kernels.wgrad import _segmented_wgrad_kernel

    blocks, g, dw = tensors
    x, n = blocks[0], g.shape[1]
    images, tokens, c = x.shape[0], stage.tokens(x.shape), x.shape[-1]
    tiles = -(-n // config.block_m) * stage.num_segments(blocks) * -(-c // config.block_n)
    strides_b, strides_t = zip(*(block.stride()[:2] for block in blocks), strict=True)
    sizes = images, n, tokens, strides_b, strides_t, g.stride(0), dw.stride(0)
    constants = config.constants() | {
        "NUM_BLOCKS": len(blocks),
        "C": c,
        "MERGE_IN": stage.merge_in,
        "GRID_W": stage.grid[1] if stage.merge_in > 1 else 0,
        "WHOLE_STEPS": tokens % config.block_k == 0,
        "INPUT_PRECISION": launch.input_precision(g.dtype),
    }
    return _segmented_wgrad_kernel, (tiles,), (tuple(blocks), g, dw), sizes, constants
