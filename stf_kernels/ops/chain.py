"""Stages in a row: the forward, the backward, and what is kept in between.

Kept for the backward, beside the caller's own blocks and weights: of each stage with an activation its
pre-activation, of each other stage but the last its output. An activation's output is never kept: the backward reads
the pre-activation once and writes both act'(pre) * dy and act(pre) from it. For the projector of LLaVA-1.5 in 16 bit
that is, per image, 576*4096 + 144*4096 + 144*16384 elements = 10.6 MB; plain PyTorch also keeps the concatenation
(9.4 MB), both activations' outputs (9.4 MB) and, in place of the fused output, its unfolded copy.

The backward, g = dL/d(pre-activation) of a stage, rows in the order of its GEMM:

    db = sum_rows g      dW_s = g^T @ X_s, each segment into its columns of dW      dX_s = g @ W_s

dW and dX run in the library GEMM (cuBLAS, MKL): they are plain matrix products once the segment is named, and
`out=` writes a slice of dW with its own row stride, so nothing is concatenated. A segment whose rows have no common
stride (a CLS-cropped batch) is copied one at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend, tuning
from . import launch, torch_path
from .stage import Stage, merge_windows, unmerge_windows


def run_stage(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stage: Stage,
    *,
    save_pre: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One stage on the path that the backend and the device's table say -> (y or out, pre-activation or None)."""
    x = blocks[0]
    if backend.use_triton(x.device, x.dtype):
        config = _configuration(x, len(blocks), weight, stage)
        if config is not None:
            try:
                return launch.launch_stage(blocks, weight, bias, stage, config, save_pre=save_pre, out=out, rows=rows)
            except launch.out_of_resources() as error:
                tuning.reject(x.device, config, error)
            config = _configuration(x, len(blocks), weight, stage)
            return launch.launch_stage(blocks, weight, bias, stage, config, save_pre=save_pre, out=out, rows=rows)
    y, pre = torch_path.run_stage(blocks, weight, bias, stage, save_pre)
    if out is None:
        return y, pre
    return out.index_copy_(0, rows, y.flatten(0, 1)), pre


def _configuration(x: Tensor, num_blocks: int, weight: Tensor, stage: Stage) -> tuning.GemmConfig | None:
    """The device's choice; None is cuBLAS, the table's to name unless the user asked for Triton."""
    m = x.shape[0] * stage.tokens(x.shape)
    may_decline = backend.current_backend() == "auto"
    return tuning.choose(x.device, stage.kind(num_blocks), x.dtype, m, *weight.shape, may_decline=may_decline)


def chain_fwd(
    blocks: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stages: Sequence[Stage],
    *,
    save: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run the stages -> (output of the last, what the backward needs if `save`). blocks: [B, T, C] each."""
    saved: list[Tensor] = []
    x: Sequence[Tensor] = blocks
    last = len(stages) - 1
    for i, (stage, weight, bias) in enumerate(zip(stages, weights, biases, strict=True)):
        target = {"out": out, "rows": rows} if i == last else {}
        y, pre = run_stage(x, weight, bias, stage, save_pre=save and stage.activation is not None, **target)
        if save and (pre is not None or i < last):
            saved.append(y if pre is None else pre)
        x = [y]
    return y, saved


def output_shapes(
    shape: Sequence[int], weights: Sequence[Tensor], stages: Sequence[Stage]
) -> list[tuple[int, int, int]]:
    """Of each stage, for blocks of a shape [B, T, C]."""
    shapes = []
    for stage, weight in zip(stages, weights, strict=True):
        shape = stage.out_shape(shape, weight.shape[0])
        shapes.append(shape)
    return shapes


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
    saved: Sequence[Tensor],
    blocks: Sequence[Tensor],
    weights: Sequence[Tensor],
    stages: Sequence[Stage],
    needs: Needs,
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of (blocks, weights, biases), None where not needed. dy has the shape of the chain's output."""
    last = len(stages) - 1
    d_blocks: list[Tensor | None] = [None] * len(blocks)
    d_weights: list[Tensor | None] = [None] * len(weights)
    d_biases: list[Tensor | None] = [None] * len(weights)

    shapes = output_shapes(blocks[0].shape, weights, stages)
    g = _rows_of(dy, stages[last])
    if stages[last].activation is not None:
        g, _, d_biases[last] = _activation_bwd(
            g.contiguous(), saved[last], stages[last].activation,
            overwrite=False, write_act=False, sum_rows=needs.biases[last],
        )  # fmt: skip
    for i in range(last, -1, -1):
        if needs.biases[i]:
            total = g.sum(0) if d_biases[i] is None else d_biases[i]
            d_biases[i] = total.to(weights[i].dtype)
        if i == 0:
            if needs.weights[0]:
                d_weights[0] = _first_weight_grad(g, blocks, weights[0], stages[0])
            if any(needs.blocks):
                d_blocks = _block_grads(g, blocks, weights[0], stages[0], needs.blocks)
            break
        before, kept = stages[i - 1], saved[i - 1]
        dx = None
        if needs.upstream_of(i):
            dx = _rows_of(torch.mm(g, weights[i]).view(shapes[i - 1]), before)
        x = kept
        if before.activation is not None:
            if dx is not None:
                dx, x, d_biases[i - 1] = _activation_bwd(
                    dx, kept, before.activation,
                    overwrite=True, write_act=needs.weights[i], sum_rows=needs.biases[i - 1],
                )  # fmt: skip
            elif needs.weights[i]:
                x = torch_path.activate_(kept.clone(), before.activation)
            if before.scatter > 1 and x is not None:
                rows = x.view(shapes[i - 1][0], math.prod(before.grid), x.shape[-1])
                x = merge_windows(rows, before.grid, before.scatter)
        if needs.weights[i]:
            d_weights[i] = torch.mm(g.t(), x.reshape(g.shape[0], weights[i].shape[1]))
        if dx is None:
            break
        g = dx
    return d_blocks, d_weights, d_biases


def _rows_of(dy: Tensor, stage: Stage) -> Tensor:
    """Gradient of a stage's output -> [rows, N], rows in the order of its GEMM."""
    if stage.scatter > 1:
        dy = unmerge_windows(dy, stage.grid, stage.scatter)
    return dy.flatten(0, 1)


def _activation_bwd(
    dy: Tensor, pre: Tensor, activation: str, *, overwrite: bool, write_act: bool, sum_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dy * act'(pre), act(pre) if write_act, column sums of the first if sum_rows), in one pass where Triton runs."""
    if backend.use_triton(pre.device, pre.dtype):
        return launch.launch_activation_bwd(
            dy, pre, activation, overwrite=overwrite, write_act=write_act, sum_rows=sum_rows
        )
    if activation == "silu":
        dpre = torch.ops.aten.silu_backward(dy, pre)
    else:
        dpre = torch.ops.aten.gelu_backward(dy, pre, approximate="tanh" if activation == "gelu_tanh" else "none")
    act = torch_path.activate_(pre.clone(), activation) if write_act else None
    return dpre, act, dpre.sum(0) if sum_rows else None


def _first_weight_grad(g: Tensor, blocks: Sequence[Tensor], weight: Tensor, stage: Stage) -> Tensor:
    c = blocks[0].shape[-1]
    dw = torch.empty(weight.shape, device=weight.device, dtype=weight.dtype)
    for s, segment in enumerate(stage.segments(blocks)):
        torch.mm(g.t(), segment.reshape(-1, c), out=dw[:, s * c : (s + 1) * c])
    return dw


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
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype) if whole else torch.zeros_like(x)
    for s, segment in enumerate(stage.segments([dx])):
        segment.copy_(torch.mm(g, weight[:, s * c : (s + 1) * c]).view(segment.shape))
    return [dx]
