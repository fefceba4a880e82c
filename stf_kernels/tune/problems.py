"""The stages of LLaVA-STF at the sizes of LLaVA-1.5-7B: what is tuned and compiled ahead of time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configs import GemmConfig
from ..ops import launch, weight_grad
from ..ops.segments import Stage


@dataclass(frozen=True)
class Problem:
    """One segmented GEMM, or its weight gradient (wgrad). tokens: GEMM rows per image; index_rows: the last stage."""

    name: str
    stage: Stage
    num_blocks: int
    c: int
    n: int
    tokens: int
    save_pre: bool = False
    index_rows: bool = False
    wgrad: bool = False

    @property
    def kind(self) -> str:
        """The name under which tuning tables know it."""
        return self.stage.kind(self.num_blocks) + ("_wgrad" if self.wgrad else "")

    @property
    def k(self) -> int:
        return self.num_blocks * self.stage.merge_in**2 * self.c

    def product(self, m: int) -> tuple[int, int, int]:
        """(rows, columns) of the result for m rows of A, and the length of the sums."""
        return (self.n, self.k, m) if self.wgrad else (m, self.n, self.k)

    def has_choice(self, batch: int) -> bool:
        """Whether a kernel is asked at all: the library takes the weight gradient of one image's rows as they are."""
        return not self.wgrad or self.stage.merge_in > 1 or batch > 1

    def operands(self, draw: Callable[..., Tensor], batch: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """(blocks, weight, bias) by draw(*shape), as the chain has them: the tower's blocks with CLS cut off by a view,
        every later operand dense; for a weight gradient what the library would copy."""
        skip = 1 if self.num_blocks > 1 or self.wgrad else 0
        shape = batch, self.tokens * self.stage.merge_in**2 + skip, self.c
        blocks = [draw(*shape)[:, skip:] for _ in range(self.num_blocks)]
        return blocks, draw(self.n, self.k), draw(self.n)

    def arguments(self, config: GemmConfig, blocks: list[Tensor], weight: Tensor, bias: Tensor) -> tuple:
        """A launch on `operands` as launch.ARGUMENTS has it: (kernel, grid, tensors, sizes, constants)."""
        x, m = blocks[0], blocks[0].shape[0] * self.tokens
        if self.wgrad:
            tensors = tuple(blocks), x.new_empty(m, self.n), x.new_empty(weight.shape)
            return weight_grad.wgrad_arguments(config, tensors, self.stage)
        y = x.new_empty((m, self.n) if self.index_rows else self.stage.out_shape(x.shape, self.n))
        pre = x.new_empty(m, self.n) if self.save_pre else None
        rows = torch.empty(m, dtype=torch.int64, device=x.device) if self.index_rows else None
        return launch.ARGUMENTS[config.form](config, (tuple(blocks), weight, bias, y, pre, rows), self.stage)


_GRID = (24, 24)

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("concat", Stage("gelu"), 8, 1024, 4096, 576),
        Problem("linear_merge", Stage(merge_out=2, grid=_GRID), 1, 4096, 1024, 576),
        Problem("linear", Stage("gelu"), 1, 4096, 16384, 144),
        Problem("merge", Stage("gelu", merge_in=2, grid=_GRID), 1, 1024, 16384, 144),
        Problem("linear_scatter", Stage(), 1, 16384, 4096, 144, index_rows=True),
        Problem("concat_train", Stage("gelu"), 8, 1024, 4096, 576, save_pre=True),
        Problem("linear_train", Stage("gelu"), 1, 4096, 16384, 144, save_pre=True),
        Problem("concat_wgrad", Stage(), 8, 1024, 4096, 576, wgrad=True),
        Problem("merge_wgrad", Stage(merge_in=2, grid=_GRID), 1, 1024, 16384, 144, wgrad=True),
    )
}
