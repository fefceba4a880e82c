"""The Triton launchers: explicit configuration in, kernel launched, nothing searched.

Under the interpreter outputs are fp32 and torch rounds them: a store into bf16 truncates there.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..backend import interpreting
from ..tuning import GemmConfig
from .forms import HALF, Call, DescriptorRefused
from .stage import Stage

# The elementwise backward: a program takes a strip of rows, tile by tile; 16 rows a tile spill with Triton 3.6.
ROWS_PER_PROGRAM, BLOCK_M, BLOCK_N = 128, 8, 128


def on_device(device: torch.device) -> AbstractContextManager:
    """A launch goes to the current device; make that the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def does_not_run() -> tuple[type[Exception], ...]:
    """What a launch raises for a configuration that asks of a GPU or its driver what they do not have."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources, DescriptorRefused


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
    strict: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run one stage with one configuration -> (y, pre-activation [M, N] or None).

    blocks: [B, T, C] each, weight [N, K], bias [N]; read in place where the last axis is contiguous, else copied.
    y has the stage's output shape, or is `out` [R, N] with row i of the GEMM written to out[rows[i]], rows int64 [M];
    rows outside [0, R) are not written. strict: the configuration's own kernel, or DescriptorRefused.
    """
    blocks, weight = [with_contiguous_last(block) for block in blocks], with_contiguous_last(weight)
    bias, rows = (None if vector is None else vector.contiguous() for vector in (bias, rows))
    x = blocks[0]
    n = weight.shape[0]
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
        call = Call(blocks, weight, bias, y, pre, rows, stage, m, tokens, y_stride, scatter_rows=out is not None)
        with on_device(x.device):
            call.launch(config, strict=strict)
    if out is not None:
        if y is not out:
            out.copy_(y)
        elif not out.is_inference():
            torch.autograd.graph.increment_version(out)  # written through a pointer: tell autograd
        return out, None if pre is None else pre.to(x.dtype)
    return y.to(x.dtype), None if pre is None else pre.to(x.dtype)


def with_contiguous_last(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, as of every hidden state; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def launch_activation_bwd(
    dy: Tensor, pre: Tensor, activation: str, *, overwrite: bool, write_act: bool, sum_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy [M, N] contiguous, pre [M, N] -> (dpre, act(pre) or None, fp32 column sums of dpre [N] or None).

    overwrite: dpre takes dy's memory.
    """
    from ..kernels.activation_bwd import _activation_bwd_kernel

    pre = pre.contiguous()  # a saved-tensor hook may give back another layout than it was given
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
                ACTIVATION=activation, FAST_ACTIVATION=pre.dtype in HALF, WRITE_ACT=write_act, SUM_ROWS=sum_rows,
                ROWS_PER_PROGRAM=ROWS_PER_PROGRAM, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            )  # fmt: skip
    total = None if partial is None else partial.sum(0)
    return dpre.to(pre.dtype), None if act is None else act.to(pre.dtype), total
