"""The stages of LLaVA-STF at the sizes of LLaVA-1.5-7B: what is compiled ahead of time and what is tuned."""

from dataclasses import dataclass

from .ops.stage import Stage


@dataclass(frozen=True)
class Problem:
    """One segmented GEMM. tokens: GEMM rows per image; scatter_rows: the last stage, into inputs_embeds."""

    name: str
    stage: Stage
    num_blocks: int
    c: int
    n: int
    tokens: int
    save_pre: bool = False
    scatter_rows: bool = False

    @property
    def k(self) -> int:
        return self.num_blocks * self.stage.gather**2 * self.c

    @property
    def source_tokens(self) -> int:
        """Tokens per image of the operand that is read."""
        return self.tokens * self.stage.gather**2


_GRID = (24, 24)

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("concat", Stage("gelu"), 8, 1024, 4096, 576),
        Problem("linear_merge", Stage(scatter=2, grid=_GRID), 1, 4096, 1024, 576),
        Problem("linear", Stage("gelu"), 1, 4096, 16384, 144),
        Problem("merge", Stage("gelu", gather=2, grid=_GRID), 1, 1024, 16384, 144),
        Problem("linear_scatter", Stage(), 1, 16384, 4096, 144, scatter_rows=True),
        Problem("concat_train", Stage("gelu"), 8, 1024, 4096, 576, save_pre=True),
        Problem("linear_train", Stage("gelu"), 1, 4096, 16384, 144, save_pre=True),
    )
}
