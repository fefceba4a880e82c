"""What the kernel table measures, in the order of its worth: a budget may end the list anywhere.

First the chain where the goals are, batch 1 and 8 in the first dtype, forward and forward + backward, against every
rival; then its stages there, the chain at the other batches and in the other dtypes. Own paths that are no default come
behind: a fault in a kernel that is new to the hardware ends the process. Last is what takes long: torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

STAGES = ("chain", "G1", "G2", "G3", "G4")
PASSES = ("forward", "forward+backward")
COMPILED = ("compile-tma", "compile")  # rivals.py; the one with more to choose from first
NEAR = (1, 8)  # the batches that goals are set for first
# What of a step is measured: the default path and rivals | own paths that are no default | torch.compile, both ways
PARTS = ("paths", "own", *COMPILED)
COMPILE_SECONDS = {"forward": 60.0, "forward+backward": 120.0}  # of the chain's four products, or twelve


@dataclass(frozen=True)
class Step:
    run: str
    stage: str
    batch: int
    dtype: str
    part: str

    @property
    def seconds(self) -> float:
        """What it may take at least: not begun with less left."""
        whole = COMPILE_SECONDS[self.run] if self.part in COMPILED else 0.0
        return whole if self.stage == "chain" else whole / 4

    def __str__(self) -> str:
        return f"{self.run}, {self.stage}, batch {self.batch}, {self.dtype}, {self.part}"


def plan(stages: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], *, compiled: bool = True) -> list[Step]:
    """Every step of these stages, batches and dtypes, each once."""
    near = [batch for batch in batches if batch in NEAR] or list(batches[:1])
    far = [batch for batch in batches if batch not in near]
    chain, single = ([s for s in stages if (s == "chain") == whole] for whole in (True, False))
    first, others = dtypes[:1], dtypes[1:]
    forward, with_tma = PASSES[:1], COMPILED[:1]

    def steps() -> Iterator[Step]:
        for parts, dtype, runs, batch, stage in (
            (["paths"], first, PASSES, near, chain),
            (with_tma, first, forward, near, chain),
            (["paths"], first, forward, near, single),
            (["paths"], first, PASSES, far, chain),
            (["paths"], others, PASSES, near, chain),
            (["own"], first, forward, near, stages),
            (["own"], first, forward, far, chain),
            (COMPILED, first, forward, near, chain),
            (COMPILED, first, PASSES, near, chain),
            (["paths"], others, PASSES, far, chain),
            (["paths"], dtypes, PASSES, batches, stages),
            (PARTS, dtypes, PASSES, batches, stages),
        ):
            for p, d, r, b, s in product(parts, dtype, runs, batch, stage):
                if p == "own" and r != "forward":
                    continue  # the backward has none of its own
                if compiled or p not in COMPILED:
                    yield Step(r, s, b, d, p)

    return list(dict.fromkeys(steps()))
