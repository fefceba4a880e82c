"""The backward of a chain. g = dL/d(pre-activation) of a stage, rows in the order of its GEMM:

    db = sum_rows g      dW = g^T @ A      dX_s = g @ W_s

It is plain torch whatever the backend. Products run in the library GEMM (cuBLAS, MKL); A of the first stage, which the
forward has not kept, is concatenated or merged again. Kernels of our own were slower and are gone: one that made
act'(pre) * dX, act(pre) and db of one reading, and one that read A of dW where it lies (bench/TUNING.md, rows 34, 23).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import torch_path
from .chain import Plan, without_autocast
from .segments import Stage


class Needs(NamedTuple):
    """Which gradients are asked for: a frozen tower costs no dX, a frozen projector no dW."""

    blocks: Sequence[bool]
    weights: Sequence[bool]
    biases: Sequence[bool]

    @classmethod
    def of(cls, flags: Sequence[bool], blocks: int, weights: int) -> "Needs":
        """From a flag for each of [*blocks, *weights, *biases], of which there may be no biases, or none at all."""
        flags = flags or [False] * (blocks + weights)
        return cls(flags[:blocks], flags[blocks : blocks + weights], flags[blocks + weights :] or [False] * weights)

    def upstream_of(self, stage: int) -> bool:
        """Whether the gradient of the input of a stage is wanted."""
        return any(self.blocks) or any(self.weights[:stage]) or any(self.biases[:stage])

    def keeps(self, stages: Sequence[Stage]) -> list[bool]:
        """[pre-activation, output] of every stage: which the backward reads, for act'(pre) * dX on the way further up,
        and as X of the next stage's dW."""
        of_next = [*self.weights[1:], False]
        flags = [(s.activation is not None and self.upstream_of(i + 1), of_next[i]) for i, s in enumerate(stages)]
        return [flag for pair in flags for flag in pair]

    def reads(self) -> list[bool]:
        """Which of [*blocks, *weights] the backward reads: X of the first dW, W of each product further up; no bias."""
        return [self.weights[0]] * len(self.blocks) + [self.upstream_of(i) for i in range(len(self.weights))]


def shapes_of(
    stages: Sequence[Stage], num_blocks: int, block: Sequence[int], widths: Sequence[int]
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """(of each stage's output, of each weight [N, K]), from the shape [B, T, C] of a block and N of each weight."""
    outputs, weights = [], []
    k, shape = num_blocks * block[2], block
    for stage, n in zip(stages, widths, strict=True):
        weights.append((n, k * stage.merge_in**2))
        shape = stage.out_shape(shape, n)
        outputs.append(shape)
        k = shape[2]
    return outputs, weights


def chain_bwd(
    plan: Plan,
    dy: Tensor,
    saved: list[Tensor | None],
    blocks: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    block: Sequence[int],
    widths: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of [*blocks, *weights, *biases], None where not needed, with zeros for the skipped tokens.

    dy has the shape of the chain's output. `saved` has an entry for every flag of `Needs.keeps`, None where it is
    false; it is consumed from its end, so that it is freed as the backward passes it. Blocks and weights that
    `Needs.reads` does not flag may be None; block is the shape of each block, widths are N of each weight.
    """
    (stages, skip), wants, last = plan, Needs.of(needs, len(blocks), len(weights)), len(weights) - 1
    blocks = [None if x is None else x.narrow(1, skip, block[1] - skip) for x in blocks]
    block = block[0], block[1] - skip, block[2]
    shapes, weight_shapes = shapes_of(stages, len(blocks), block, widths)
    d_blocks: list[Tensor | None] = [None] * len(blocks)
    d_weights: list[Tensor | None] = [None] * len(weights)
    d_biases: list[Tensor | None] = [None] * len(weights)

    def through(i: int, dx: Tensor, pre: Tensor | None, *, own: bool = True) -> Tensor:
        """dL/d(output of stage i) -> its g, in dx's memory if that is our own."""
        stage = stages[i]
        if stage.merge_out > 1:
            dx = torch_path.unmerged(dx, stage.grid, stage.merge_out)
        g = dx.flatten(0, 1)  # rows in the order of the stage's GEMM
        if stage.activation is None:
            return g
        return torch_path.activation_bwd(g.contiguous(), pre, stage.activation, overwrite=own)

    with without_autocast(dy.device.type):  # of the region that the backward is called in
        saved.pop()  # the last stage's output is nobody's X
        g = through(last, dy, saved.pop(), own=False)
        for i in range(last, -1, -1):
            if wants.biases[i]:
                d_biases[i] = g.sum(0)
            if i == 0:
                break
            x, pre = saved.pop(), saved.pop()
            if wants.weights[i]:
                d_weights[i] = torch.mm(g.t(), x.reshape(g.shape[0], weight_shapes[i][1]))
            if not wants.upstream_of(i):
                break
            del x
            g = through(i - 1, torch.mm(g, weights[i]).view(shapes[i - 1]), pre)
            del pre  # of the first stage before the largest product
        if wants.weights[0]:
            d_weights[0] = torch.mm(g.t(), torch_path.gathered(blocks, stages[0]).flatten(0, 1))
        if any(wants.blocks):
            d_blocks = _block_grads(g, block, weights[0], stages[0], wants.blocks)
    if skip:
        d_blocks = [g if g is None else nn.functional.pad(g, (0, 0, skip, 0)) for g in d_blocks]
    return [*d_blocks, *d_weights, *d_biases]


def _block_grads(g: Tensor, shape: Sequence[int], weight: Tensor, stage: Stage, needs: Sequence[bool]) -> list:
    """dX of each needed block: windows tile one, so every row is written once."""
    if stage.merge_in > 1:
        merged = torch.mm(g, weight).view(shape[0], stage.tokens(shape), weight.shape[1])
        return [torch_path.unmerged(merged, stage.grid, stage.merge_in)]
    parts = weight.tensor_split(len(needs), dim=1)
    return [torch.mm(g, part).view(shape) if need else None for part, need in zip(parts, needs, strict=True)]
