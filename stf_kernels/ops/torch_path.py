"""One stage in plain torch: for CPUs, for GPUs that Triton does not serve, for float64, and where cuBLAS is faster.

In fp32 and fp64 the GEMM runs segment by segment and no concatenation or unfold exists:

    y = b + sum_s X_s @ W_s^T

In 16 bit the segments are concatenated and one GEMM runs: a sum of rounded partial products has three times its error.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .stage import Stage, merge_windows

WIDE = (torch.float32, torch.float64)


def linear(blocks: Sequence[Tensor], weight: Tensor, bias: Tensor | None, stage: Stage) -> Tensor:
    """A @ W^T + b -> [rows, N], rows in the order of the GEMM."""
    if stage.num_segments(blocks) == 1 or blocks[0].dtype not in WIDE:
        return F.linear(_gathered(blocks, stage), weight, bias)
    c = blocks[0].shape[-1]
    y = None
    for s, segment in enumerate(stage.segments(blocks)):
        # reshape copies one segment where its rows have no common stride (a CLS-cropped batch), never all of them
        x, w = segment.flatten(0, -2), weight[:, s * c : (s + 1) * c]
        if y is not None:
            y.addmm_(x, w.t())
        elif bias is None:
            y = torch.mm(x, w.t())
        else:
            y = torch.addmm(bias, x, w.t())
    return y


def _gathered(blocks: Sequence[Tensor], stage: Stage) -> Tensor:
    """The dense operand [rows, K]; a view where one segment with common strides is all there is."""
    segments = [segment.flatten(1, -2) for segment in stage.segments(blocks)]
    x = segments[0] if len(segments) == 1 else torch.cat(segments, dim=-1)
    return x.flatten(0, 1)


def activate_(x: Tensor, activation: str | None) -> Tensor:
    """The activation, in place where torch has it in place."""
    if activation == "gelu":
        return torch.ops.aten.gelu_(x)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x, inplace=True)
    return x


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The activation, as a new tensor."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "silu" else x


def activation_backward(dy: Tensor, pre: Tensor, activation: str, *, into: Tensor | None) -> Tensor:
    """dy * act'(pre), written over `into` if given (dy itself may be)."""
    out = torch.empty_like(dy) if into is None else into
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(dy, pre, grad_input=out)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(dy, pre, approximate=approximate, grad_input=out)


def run_stage(
    blocks: Sequence[Tensor], weight: Tensor, bias: Tensor | None, stage: Stage, save_pre: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, pre-activation [rows, N] or None); y in the stage's output shape and no view, so that it may be changed."""
    n = weight.shape[0]
    y = linear(blocks, weight, bias, stage)
    pre = y if save_pre else None
    y = activate(y, stage.activation) if save_pre else activate_(y, stage.activation)
    if stage.scatter > 1:
        return merge_windows(y.view(*blocks[0].shape[:2], n), stage.grid, stage.scatter), pre
    return torch.ops.aten._unsafe_view(y, stage.out_shape(blocks[0].shape, n)), pre
