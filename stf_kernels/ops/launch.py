"""The Triton launchers: explicit configuration in, kernel launched, nothing searched.

Under the interpreter outputs are fp32 and torch rounds them: a store into bf16 truncates there.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..backend import interpreting
from ..tuning import GemmConfig
from .direct_launch import launch
from .stage import Stage
from .workspace import arrival_counters, partial_sums

_HALF = (torch.float16, torch.bfloat16)
# The elementwise backward: a program takes a strip of rows, tile by tile; 16 rows a tile spill with Triton 3.6.
ROWS_PER_PROGRAM, BLOCK_M, BLOCK_N = 128, 8, 128


def on_device(device: torch.device) -> AbstractContextManager:
    """A launch goes to the current device; make that the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def out_of_resources() -> type[Exception]:
    """What Triton raises for a configuration that asks more of a GPU than it has."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def launch_stage(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stage: Stage,
    config: GemmConfig,
    *,
    save_pre: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run one stage with one configuration -> (y, pre-activation [M, N] or None).

    blocks: [B, T, C] each, weight [N, K], bias [N]; read in place where the last axis is contiguous, else copied.
    y has the stage's output shape, or is `out` [R, N] with row i of the GEMM written to out[rows[i]], rows int64 [M];
    rows outside [0, R) are not written.
    """
    blocks, weight = [with_contiguous_last(block) for block in blocks], with_contiguous_last(weight)
    bias, rows = (None if vector is None else vector.contiguous() for vector in (bias, rows))
    x = blocks[0]
    n, c = weight.shape[0], x.shape[-1]
    tokens = stage.tokens(x.shape)
    m = x.shape[0] * tokens
    store_dtype = torch.float32 if interpreting() else x.dtype
    if out is None:
        y = torch.empty(stage.out_shape(x.shape, n), device=x.device, dtype=store_dtype)
        y_stride = y.shape[-1]
    else:
        y = out.to(store_dtype)  # `out` itself, but for the interpreter
        y_stride = y.stride(0)
    pre = torch.empty((m, n), device=x.device, dtype=store_dtype) if save_pre else None
    if m and n:
        strides = [block.stride()[:2] for block in blocks]
        uniform = all(stride == strides[0] for stride in strides)
        if uniform:
            strides = strides[:1]
        pointers = (tuple(blocks), weight, bias, y, pre, rows)
        sizes = (
            m, n, tokens, stage.grid[1], stage.grid[0],
            tuple(stride[0] for stride in strides), tuple(stride[1] for stride in strides),
            weight.stride(0), y_stride, y.shape[0],
        )  # fmt: skip
        constants = stage_constants(
            stage, len(blocks), c, x.dtype, config, uniform_strides=uniform, has_bias=bias is not None,
            save_pre=save_pre, scatter_rows=out is not None,
        )  # fmt: skip
        with on_device(x.device):
            _launch(config, m, n, pointers, sizes, constants)
    if out is not None:
        if y is not out:
            out.copy_(y)
        elif not out.is_inference():
            torch.autograd.graph.increment_version(out)  # written through a pointer: tell autograd
        return out, None if pre is None else pre.to(x.dtype)
    return y.to(x.dtype), None if pre is None else pre.to(x.dtype)


def _launch(config: GemmConfig, m: int, n: int, pointers: tuple, sizes: tuple, constants: dict[str, object]) -> None:
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.split_k == 1:
        from ..kernels.segmented_linear import _segmented_linear_fwd_kernel

        launch(_segmented_linear_fwd_kernel, (tiles,), pointers + sizes, constants, **options)
        return
    from ..kernels.split_k import _segmented_linear_split_k_fwd_kernel

    device = pointers[1].device
    shared = (
        partial_sums(tiles, config.split_k, config.block_m * config.block_n, device),
        arrival_counters(tiles, device),
    )
    constants = {**constants, "SPLIT_K": config.split_k}
    grid = (tiles, config.split_k)
    launch(_segmented_linear_split_k_fwd_kernel, grid, pointers + shared + sizes, constants, **options)


def with_contiguous_last(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, as of every hidden state; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def stage_constants(
    stage: Stage, num_blocks: int, c: int, dtype: torch.dtype, config: GemmConfig, *, uniform_strides: bool,
    has_bias: bool, save_pre: bool, scatter_rows: bool,
) -> dict[str, object]:  # fmt: skip
    """The kernel's constexpr parameters: what a compiled specialisation is made for, beside types and alignment."""
    return {
        "NUM_BLOCKS": num_blocks,
        "C": c,
        "GATHER": stage.gather,
        "UNIFORM_STRIDES": uniform_strides,
        "STORE": "scatter" if scatter_rows else "merge" if stage.scatter > 1 else "rows",
        "MERGE": stage.scatter,
        "ACTIVATION": stage.activation or "none",
        "FAST_ACTIVATION": dtype in _HALF,
        "HAS_BIAS": has_bias,
        "SAVE_PRE": save_pre,
        "INPUT_PRECISION": input_precision(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def input_precision() -> str:
    """fp32 operands as torch multiplies them: IEEE unless torch.backends.cuda.matmul allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch_activation_bwd(
    dy: Tensor, pre: Tensor, activation: str, *, overwrite: bool, write_act: bool, sum_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, pre [M, N] contiguous -> (dpre, act(pre) or None, fp32 column sums of dpre [N] or None).

    overwrite: dpre takes dy's memory.
    """
    from ..kernels.activation_bwd import _activation_bwd_kernel

    m, n = pre.shape
    store_dtype = torch.float32 if interpreting() else pre.dtype
    dpre = dy if overwrite and dy.dtype == store_dtype else torch.empty_like(pre, dtype=store_dtype)
    act = torch.empty_like(pre, dtype=store_dtype) if write_act else None
    strips = -(-m // ROWS_PER_PROGRAM)
    partial = torch.empty((strips, n), device=pre.device, dtype=torch.float32) if sum_rows else None
    if m and n:
        with on_device(pre.device):
            _activation_bwd_kernel[(strips, -(-n // BLOCK_N))](
                dy, pre, dpre, act, partial, m, n,
                ACTIVATION=activation, FAST_ACTIVATION=pre.dtype in _HALF, WRITE_ACT=write_act, SUM_ROWS=sum_rows,
                ROWS_PER_PROGRAM=ROWS_PER_PROGRAM, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            )  # fmt: skip
    total = None if partial is None else partial.sum(0)
    return dpre.to(pre.dtype), None if act is None else act.to(pre.dtype), total
