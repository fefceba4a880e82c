"""One stage in plain torch: for CPUs, for GPUs that Triton does not serve, for float64, and where cuBLAS is faster.

On a CPU, in fp32 and fp64, the GEMM runs segment by segment, without a concatenation or an unfolded copy:

    y = b + sum_s X_s @ W_s^T

Else the segments are copied side by side and one GEMM runs: in 16 bit a sum of rounded partial products has three times
its error, and on a GPU every part is a pass over y and a launch. There torch's strided copies take as long for an
element of 16 bytes as for one of 2, so they are given those of 16 (bench/TUNING.md, row 39).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .segments import Stage, merge_windows, unmerge_windows

WIDE = (torch.float32, torch.float64)
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
# The binding that F.gelu is, in place: torch.ops.aten.gelu_ takes longer to call.
_gelu_ = torch._C._nn.gelu_  # type: ignore[attr-defined]
_gelu_backward, _silu_backward = torch.ops.aten.gelu_backward.grad_input, torch.ops.aten.silu_backward.grad_input


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
    """As launch.run_stage."""
    n = weight.shape[0]
    y = _linear(blocks, weight, bias, stage)
    pre = y.view(-1, n) if save_pre else None
    y = activate(y, stage.activation, inplace=not save_pre)
    if stage.merge_out > 1:
        return merged(y, stage.grid, stage.merge_out), pre
    if out is not None:
        return out.index_copy_(0, rows, y.view(-1, n).to(out.dtype)), pre
    return y, pre


def _linear(blocks: Sequence[Tensor], weight: Tensor, bias: Tensor | None, stage: Stage) -> Tensor:
    """A @ W^T + b -> [B, tokens, N], rows in the order of the GEMM."""
    x = blocks[0]
    by_segments = x.dtype in WIDE and x.is_cpu and stage.num_segments(blocks) > 1
    if not by_segments or is_transformed():
        if bias is not None:
            bias = bias.contiguous()  # else torch adds it behind the product, which it has rounded then
        return F.linear(gathered(blocks, stage), weight, bias)
    c = x.shape[-1]
    y = None
    for s, segment in enumerate(stage.segments(blocks)):
        # flatten copies one segment where its rows have no common stride (a CLS-cropped batch), never all of them
        rows, w = segment.flatten(0, -2), weight[:, s * c : (s + 1) * c]
        y = F.linear(rows, w, bias) if y is None else y.addmm_(rows, w.t())
    return y.view(x.shape[0], stage.tokens(x.shape), weight.shape[0])


def gathered(blocks: Sequence[Tensor], stage: Stage) -> Tensor:
    """A of a stage as one operand [B, tokens, K], contiguous: then the bias is the GEMM's."""
    if stage.merge_in > 1:
        return merged(blocks[0], stage.grid, stage.merge_in)
    if len(blocks) == 1:
        return blocks[0].contiguous()
    if blocks[0].is_contiguous():  # torch.cat has a fast kernel of its own for those
        return torch.cat(list(blocks), -1)
    return in_16_bytes(lambda wide: torch.cat(wide, -1), list(blocks))


def merged(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """segments.merge_windows"""
    return in_16_bytes(lambda wide: merge_windows(wide[0], grid, size), [x])


def unmerged(y: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """segments.unmerge_windows"""
    return in_16_bytes(lambda wide: unmerge_windows(wide[0], grid, size), [y], size * size)


def in_16_bytes(copy: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], parts: int = 1) -> Tensor:
    """copy(tensors), which moves whole rows, or `parts` of a row, and looks into none; on a GPU in units of 16 bytes
    where every part is a multiple of that."""
    # a tensor that torch.func wraps has no address
    if copies_by_element(tensors[0]) and not is_transformed() and all(_is_wide(x, parts) for x in tensors):
        copied = copy([x.view(torch.complex128) for x in tensors])
        return copied.contiguous().view(tensors[0].dtype)  # of a repeated row reshape makes no copy
    return copy(tensors)


def copies_by_element(x: Tensor) -> bool:
    return x.is_cuda


def _is_wide(x: Tensor, parts: int) -> bool:
    unit = 16 // x.element_size()
    if x.data_ptr() % 16 or x.storage_offset() % unit or x.shape[-1] % (parts * unit) or x.is_neg():
        return False
    *strides, last = x.stride()
    return last == 1 and not any(stride % unit for stride in strides)


def activate(x: Tensor, activation: str | None, *, inplace: bool = False) -> Tensor:
    if activation is None:
        return x
    if activation == "silu":
        return F.silu(x, inplace=inplace)
    return (_gelu_ if inplace else F.gelu)(x, approximate=_APPROXIMATE[activation])


def activation_bwd(dy: Tensor, pre: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """dy * act'(pre), in dy's memory if overwrite."""
    out = dy if overwrite else torch.empty_like(dy)
    if activation == "silu":
        return _silu_backward(dy, pre, grad_input=out)
    return _gelu_backward(dy, pre, approximate=_APPROXIMATE[activation], grad_input=out)


def is_transformed() -> bool:
    """Inside torch.func's grad, vjp, jvp, vmap, or at a level of forward-mode differentiation."""
    # isinstance: a tracer of torch.compile takes an absent interpreter for an object that is not None
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return isinstance(interpreter, torch._C._functorch.CInterpreter) or forward_ad._current_level >= 0
