"""The backward of a chain. g = dL/d(pre-activation) of a stage, rows in the order of its GEMM:

    db = sum_rows g      dW_s = g^T @ X_s, each segment into its columns of dW      dX_s = g @ W_s

dW and dX run in the library GEMM (cuBLAS, MKL): they are plain matrix products once the segment is named. The first
stage's dW, whose X are the caller's own blocks, has a file of its own, weight_grad.py. Where Triton runs, one
elementwise kernel reads a pre-activation once and writes act'(pre) * dX, act(pre) and the column sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch, torch_path
from .segments import Stage, unmerge_windows
from .weight_grad import first_weight_grad


class Sizes(NamedTuple):
    """Shapes of a chain's tensors, of which a backward is given only those that it reads."""

    num_blocks: int
    block: Sequence[int]  # [B, T, C] of each
    widths: Sequence[int]  # N of each weight [N, K]

    @classmethod
    def of(cls, blocks: Sequence[Tensor], weights: Sequence[Tensor]) -> "Sizes":
        return cls(len(blocks), blocks[0].shape, [weight.shape[0] for weight in weights])

    def without(self, tokens: int) -> "Sizes":
        """Of blocks cropped by leading tokens."""
        batch, total, channels = self.block
        return self._replace(block=(batch, total - tokens, channels))

    def outputs(self, stages: Sequence[Stage]) -> list[tuple[int, int, int]]:
        shapes, shape = [], self.block
        for stage, n in zip(stages, self.widths, strict=True):
            shape = stage.out_shape(shape, n)
            shapes.append(shape)
        return shapes

    def weights(self, stages: Sequence[Stage]) -> list[tuple[int, int]]:
        shapes, k = [], self.num_blocks * self.block[2]
        for stage, n in zip(stages, self.widths, strict=True):
            shapes.append((n, k * stage.merge_in**2))
            k = n * stage.merge_out**2
        return shapes


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for: a frozen tower costs no dX, a frozen projector no dW."""

    blocks: Sequence[bool]
    weights: Sequence[bool]
    biases: Sequence[bool]

    @classmethod
    def of(cls, flags: Sequence[bool], blocks: int, weights: int) -> "Needs":
        """From a flag for each of [*blocks, *weights, *biases], of which there may be no biases."""
        return cls(flags[:blocks], flags[blocks : blocks + weights], flags[blocks + weights :] or [False] * weights)

    def upstream_of(self, stage: int) -> bool:
        """Whether the gradient of the input of a stage is wanted."""
        return any(self.blocks) or any(self.weights[:stage]) or any(self.biases[:stage])

    def keeps(self, stages: Sequence[Stage]) -> list[bool]:
        """Of which stages the backward reads the pre-activation, or the output where there is no activation.

        Between two stages it is X of the next one's dW, and what act'(pre) * dX is made of on the way further up.
        """
        last = len(stages) - 1
        anything = self.upstream_of(last + 1)
        return [
            self.weights[i + 1] or (stage.activation is not None and self.upstream_of(i + 1))
            if i < last
            else stage.activation is not None and anything
            for i, stage in enumerate(stages)
        ]

    def reads(self) -> list[bool]:
        """Which of [*blocks, *weights] the backward reads: X of the first dW, W of each product further up; no bias."""
        return [self.weights[0]] * len(self.blocks) + [self.upstream_of(i) for i in range(len(self.weights))]


def chain_bwd(
    dy: Tensor,
    saved: list[Tensor | None],
    blocks: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    sizes: Sizes,
    stages: Sequence[Stage],
    needs: Needs,
    path: str,
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of (blocks, weights, biases), None where not needed. dy has the shape of the chain's output.

    `saved` has an entry for every stage, None where `needs.keeps` has no flag. It is consumed from its end, so that it
    is freed as the backward passes it. Blocks and weights that `needs.reads` does not flag may be None. path: see
    backend.resolve.
    """
    last = len(stages) - 1
    shapes, weight_shapes = sizes.outputs(stages), sizes.weights(stages)
    d_blocks: list[Tensor | None] = [None] * len(blocks)
    d_weights: list[Tensor | None] = [None] * len(weights)
    d_biases: list[Tensor | None] = [None] * len(weights)

    g, kept = _rows_of(dy, stages[last]), saved.pop()
    if kept is not None:
        g, _, d_biases[last] = _through_activation(
            g.contiguous(), kept, stages[last], path, own=False, write_act=False, sum_rows=needs.biases[last]
        )
    for i in range(last, 0, -1):
        if needs.biases[i] and d_biases[i] is None:
            d_biases[i] = g.sum(0)
        before, upstream = stages[i - 1], needs.upstream_of(i)
        kept = saved.pop()
        fused = before.activation is not None and upstream and path != "torch"
        x = None
        if fused:
            dx = torch.mm(g, weights[i])
            dx, x, d_biases[i - 1] = _through_activation(
                dx, kept, before, path, own=True, write_act=needs.weights[i], sum_rows=needs.biases[i - 1]
            )
        if needs.weights[i]:
            if x is None:
                x = kept if before.activation is None else torch_path.activate(kept, before.activation)
            d_weights[i] = torch.mm(g.t(), x.reshape(g.shape[0], weight_shapes[i][1]))
            x = None
        if not upstream:
            break
        if not fused:
            dx = _rows_of(torch.mm(g, weights[i]).view(shapes[i - 1]), before)
            if before.activation is not None:
                dx, _, d_biases[i - 1] = _through_activation(
                    dx, kept, before, path, own=True, write_act=False, sum_rows=needs.biases[i - 1]
                )
        g, kept = dx, None
    else:
        if needs.biases[0] and d_biases[0] is None:
            d_biases[0] = g.sum(0)
        if needs.weights[0]:
            d_weights[0] = first_weight_grad(g, blocks, weight_shapes[0], stages[0], path)
        if any(needs.blocks):
            d_blocks = _block_grads(g, sizes.block, weights[0], stages[0], needs.blocks)
    d_biases = [None if db is None else db.to(dy.dtype) for db in d_biases]
    return d_blocks, d_weights, d_biases


def _rows_of(dy: Tensor, stage: Stage) -> Tensor:
    """Gradient of a stage's output -> [rows, N], rows in the order of its GEMM."""
    if stage.merge_out > 1:
        dy = unmerge_windows(dy, stage.grid, stage.merge_out)
    return dy.flatten(0, 1)


def _through_activation(
    dy: Tensor, pre: Tensor, stage: Stage, path: str, *, own: bool, write_act: bool, sum_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dy * act'(pre), act(pre) if write_act, column sums of the first if sum_rows); takes dy's memory if `own`."""
    if path != "torch":
        return launch.run_activation_bwd(
            dy, pre, stage.activation, overwrite=own, write_act=write_act, sum_rows=sum_rows
        )
    dpre = torch_path.activation_backward(dy, pre, stage.activation, into=dy if own else None)
    return dpre, None, dpre.sum(0) if sum_rows else None


def _block_grads(
    g: Tensor, shape: Sequence[int], weight: Tensor, stage: Stage, needed: Sequence[bool]
) -> list[Tensor | None]:
    """dX of each needed block. Windows tile the grid, so every row is written once: no atomics, no accumulation."""
    c = shape[2]
    if stage.merge_in == 1:
        return [
            torch.mm(g, weight[:, s * c : (s + 1) * c]).view(shape) if need else None for s, need in enumerate(needed)
        ]
    whole = all(side % stage.merge_in == 0 for side in stage.grid)
    dx = g.new_empty(shape) if whole else g.new_zeros(shape)
    for s, segment in enumerate(stage.segments([dx])):
        segment.copy_(torch.mm(g, weight[:, s * c : (s + 1) * c]).view(segment.shape))
    return [dx]
