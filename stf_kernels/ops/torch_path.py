"""One stage in plain torch: for CPUs, for GPUs that Triton does not serve, for float64, and where cuBLAS is faster.

In fp32 and fp64 the GEMM runs segment by segment, without a concatenation or an unfolded copy:

    y = b + sum_s X_s @ W_s^T

In 16 bit the segments are concatenated and one GEMM runs: a sum of rounded partial products has three times its error.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .segments import Stage, merge_windows

WIDE = (torch.float32, torch.float64)
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def run_stage(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stage: Stage,
    save_pre: bool = False,
    *,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As launch.run_stage; y is no view, so that it may be changed."""
    n = weight.shape[0]
    y = _linear(blocks, weight, bias, stage)
    pre = y if save_pre else None
    y = activate(y, stage.activation, inplace=not save_pre)
    if stage.merge_out > 1:
        return merge_windows(y.view(*blocks[0].shape[:2], n), stage.grid, stage.merge_out), pre
    if out is not None:
        return out.index_copy_(0, rows, y.to(out.dtype)), pre
    return torch.ops.aten._unsafe_view(y, stage.out_shape(blocks[0].shape, n)), pre


def _linear(blocks: Sequence[Tensor], weight: Tensor, bias: Tensor | None, stage: Stage) -> Tensor:
    """A @ W^T + b -> [rows, N], rows in the order of the GEMM."""
    if stage.num_segments(blocks) == 1 or blocks[0].dtype not in WIDE or is_transformed():
        segments = [segment.flatten(1, -2) for segment in stage.segments(blocks)]
        x = segments[0] if len(segments) == 1 else torch.cat(segments, dim=-1)
        return F.linear(x.flatten(0, 1), weight, bias)
    c = blocks[0].shape[-1]
    y = None
    for s, segment in enumerate(stage.segments(blocks)):
        # flatten copies one segment where its rows have no common stride (a CLS-cropped batch), never all of them
        x, w = segment.flatten(0, -2), weight[:, s * c : (s + 1) * c]
        y = F.linear(x, w, bias) if y is None else y.addmm_(x, w.t())
    return y


def activate(x: Tensor, activation: str | None, *, inplace: bool = False) -> Tensor:
    if activation is None:
        return x
    if activation == "silu":
        return F.silu(x, inplace=inplace)
    gelu = torch.ops.aten.gelu_ if inplace else F.gelu
    return gelu(x, approximate=_APPROXIMATE[activation])


def run_activation_bwd(
    dy: Tensor, pre: Tensor, activation: str, *, overwrite: bool, write_act: bool, sum_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy * act'(pre), act(pre) if write_act, column sums of the first if sum_rows; as launch.run_activation_bwd."""
    out = dy if overwrite else torch.empty_like(dy)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dy, pre, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(dy, pre, approximate=_APPROXIMATE[activation], grad_input=out)
    return out, activate(pre, activation) if write_act else None, out.sum(0) if sum_rows else None


def is_transformed() -> bool:
    """Inside torch.func's grad, vjp, jvp, vmap, or at a level of forward-mode differentiation."""
    # isinstance: a tracer of torch.compile takes an absent interpreter for an object that is not None
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return isinstance(interpreter, torch._C._functorch.CInterpreter) or forward_ad._current_level >= 0
