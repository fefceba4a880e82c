"""The backward of a chain. g = dL/d(pre-activation) of a stage, rows in the order of its GEMM:

    db = sum_rows g      dW_s = g^T @ X_s, each segment into its columns of dW      dX_s = g @ W_s

dW and dX run in the library GEMM (cuBLAS, MKL): they are plain matrix products once the segment is named, and
`out=` writes a slice of dW with its own row stride, so nothing is concatenated. A segment whose rows have no common
stride (a CLS-cropped batch) is taken image by image on the CPU in fp32 and fp64, and else copied, one at a time. Where
Triton runs, one elementwise kernel reads a pre-activation once and writes act'(pre) * dX, act(pre) and the column sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend
from . import launch, torch_path
from .chain import output_shapes
from .stage import Stage, unmerge_windows


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for: a frozen tower costs no dX, a frozen projector no dW."""

    blocks: Sequence[bool]
    weights: Sequence[bool]
    biases: Sequence[bool]

    def upstream_of(self, stage: int) -> bool:
        return any(self.blocks) or any(self.weights[:stage]) or any(self.biases[:stage])


def chain_bwd(
    dy: Tensor,
    saved: list[Tensor],
    blocks: Sequence[Tensor],
    weights: Sequence[Tensor],
    stages: Sequence[Stage],
    needs: Needs,
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of (blocks, weights, biases), None where not needed. dy has the shape of the chain's output.

    `saved` is consumed from its end, so that what was kept is freed as the backward passes it.
    """
    last = len(stages) - 1
    shapes = output_shapes(blocks[0].shape, weights, stages)
    d_blocks: list[Tensor | None] = [None] * len(blocks)
    d_weights: list[Tensor | None] = [None] * len(weights)
    d_biases: list[Tensor | None] = [None] * len(weights)

    g = _rows_of(dy, stages[last])
    if stages[last].activation is not None:
        g, _, d_biases[last] = _through_activation(
            g.contiguous(), saved.pop(), stages[last], own=False, write_act=False, sum_rows=needs.biases[last]
        )
    for i in range(last, 0, -1):
        if needs.biases[i] and d_biases[i] is None:
            d_biases[i] = g.sum(0)
        before, kept, upstream = stages[i - 1], saved.pop(), needs.upstream_of(i)
        fused = before.activation is not None and upstream and backend.use_triton(kept.device, kept.dtype)
        x = None
        if fused:
            dx = torch.mm(g, weights[i])
            dx, x, d_biases[i - 1] = _through_activation(
                dx, kept, before, own=True, write_act=needs.weights[i], sum_rows=needs.biases[i - 1]
            )
        if needs.weights[i]:
            if x is None:
                x = kept if before.activation is None else torch_path.activate(kept, before.activation)
            d_weights[i] = torch.mm(g.t(), x.reshape(g.shape[0], weights[i].shape[1]))
            x = None
        if not upstream:
            break
        if not fused:
            dx = _rows_of(torch.mm(g, weights[i]).view(shapes[i - 1]), before)
            if before.activation is not None:
                dx, _, d_biases[i - 1] = _through_activation(
                    dx, kept, before, own=True, write_act=False, sum_rows=needs.biases[i - 1]
                )
        g, kept = dx, None
    else:
        if needs.biases[0] and d_biases[0] is None:
            d_biases[0] = g.sum(0)
        if needs.weights[0]:
            d_weights[0] = _first_weight_grad(g, blocks, weights[0], stages[0])
        if any(needs.blocks):
            d_blocks = _block_grads(g, blocks, weights[0], stages[0], needs.blocks)
    d_biases = [None if db is None else db.to(weight.dtype) for db, weight in zip(d_biases, weights, strict=True)]
    return d_blocks, d_weights, d_biases


def _rows_of(dy: Tensor, stage: Stage) -> Tensor:
    """Gradient of a stage's output -> [rows, N], rows in the order of its GEMM."""
    if stage.scatter > 1:
        dy = unmerge_windows(dy, stage.grid, stage.scatter)
    return dy.flatten(0, 1)


def _through_activation(
    dy: Tensor, pre: Tensor, stage: Stage, *, own: bool, write_act: bool, sum_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dy * act'(pre), act(pre) if write_act, column sums of the first if sum_rows); takes dy's memory if `own`."""
    if backend.use_triton(pre.device, pre.dtype):
        return launch.launch_activation_bwd(
            dy, pre, stage.activation, overwrite=own, write_act=write_act, sum_rows=sum_rows
        )
    dpre = torch_path.activation_backward(dy, pre, stage.activation, into=dy if own else None)
    return dpre, None, dpre.sum(0) if sum_rows else None


def _first_weight_grad(g: Tensor, blocks: Sequence[Tensor], weight: Tensor, stage: Stage) -> Tensor:
    c = blocks[0].shape[-1]
    dw = torch.empty(weight.shape, device=weight.device, dtype=weight.dtype)
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
    """A CLS-cropped batch, whose rows have no common stride, in fp32 or fp64 on the CPU.

    A GPU would read and write dW once an image; there copying one segment is cheaper.
    """
    batch, tokens = segment.shape[:2]
    apart = batch > 1 and tokens > 0 and segment.stride(0) != tokens * segment.stride(1)
    return apart and segment.dtype in torch_path.WIDE and segment.device.type == "cpu"


def _block_grads(
    g: Tensor, blocks: Sequence[Tensor], weight: Tensor, stage: Stage, needed: Sequence[bool]
) -> list[Tensor | None]:
    """dX of each needed block. Windows tile the grid, so every row is written once: no atomics, no accumulation."""
    c = blocks[0].shape[-1]
    if stage.gather == 1:
        return [
            torch.mm(g, weight[:, s * c : (s + 1) * c]).view(block.shape) if needed[s] else None
            for s, block in enumerate(blocks)
        ]
    x = blocks[0]
    whole = all(side % stage.gather == 0 for side in stage.grid)
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype) if whole else x.new_zeros(x.shape)
    for s, segment in enumerate(stage.segments([dx])):
        segment.copy_(torch.mm(g, weight[:, s * c : (s + 1) * c]).view(segment.shape))
    return [dx]
