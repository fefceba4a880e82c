"""The least time that work can take:  max(FLOPs / arithmetic ceiling, bytes / memory ceiling)  for every product.

Ceilings are measured in the same run, with a large matrix product and a large copy of random data.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Work(NamedTuple):
    """Operations and bytes of one product."""

    flops: float
    bytes: float


def linear(rows: float, inner: int, columns: int, item: int) -> Work:
    """y [rows, columns] = x [rows, inner] @ w, each operand and the result moved once."""
    return Work(2.0 * rows * inner * columns, float(item) * (rows * inner + inner * columns + rows * columns))


@dataclass(frozen=True)
class Ceilings:
    """Matrix FLOP/s, bytes/s of memory, and where the numbers come from."""

    flops: float
    bandwidth: float
    source: str

    def seconds(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def measure_ceilings(device: str, dtype: Any = None, *, side: int | None = None) -> Ceilings:
    """The best of six products of `side` and of six copies."""
    import torch

    from .meters import milliseconds

    gpu = device.startswith("cuda")
    dtype, side = dtype or (torch.bfloat16 if gpu else torch.float32), side or (8192 if gpu else 1536)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn((1 << 28) if gpu else (1 << 24), device=device)
    target, best = torch.empty_like(source), []
    for call in (lambda: a @ b, lambda: target.copy_(source)):
        taken = [milliseconds(call, device) for _ in range(8)]
        best.append(min(taken[2:]) / 1e3)
    name = str(dtype).removeprefix("torch.")
    return Ceilings(2 * side**3 / best[0], 2 * source.nbytes / best[1], f"measured in this run, {name}")
