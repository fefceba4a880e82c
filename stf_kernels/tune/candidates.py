"""The configurations worth measuring for a problem. The rest is pruned before anything runs:

shared memory    stages * block_k * (block_m + block_n) * itemsize  within the device's limit
registers        the fp32 accumulator takes at most 128 registers a thread
cost             waves of tiles over the multiprocessors times the work of a tile, padding included;
                 what is over twice the best is not tried
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..configs import GemmConfig
from ..configs.model import has_tma
from .problems import Problem

_ACCUMULATOR_REGISTERS = 128
_NOT_WORTH_TRYING = 2.0  # times the best estimate


def candidates(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    *,
    shared_limit: int,
    multiprocessors: int,
    splits: Sequence[int] = (1, 2, 4, 8),
    forms: Sequence[str] = ("pointer",),
) -> list[GemmConfig]:
    """Configurations worth measuring for y [m, n] = A [m, k] @ W^T, the most promising first.

    Tiles come in the order of their cost, first each with one pipeline, then each with its next, so that a search cut
    short has tried every promising tile. Where two forms cost the same, tma comes first: it spares the
    address arithmetic, which the estimate does not see.
    """
    tiles = [
        (cost(tile.rows, tile.bn, tile.splits, m, n, k, multiprocessors), tile.form == "pointer", tile)
        for form in forms
        for tile in _tiles(form, splits)
    ]
    best = min(tiles)[0]
    promising = [tile for estimate, _, tile in sorted(tiles) if estimate <= _NOT_WORTH_TRYING * best]
    pipelines = [list(_pipelines(tile, itemsize, shared_limit)) for tile in promising]
    return [config for turn in itertools.zip_longest(*pipelines) for config in turn if config is not None]


class Tile(NamedTuple):
    """bm + tail rows by bn columns of y, K shared out among `splits` programs."""

    form: str
    bm: int
    tail: int
    bn: int
    splits: int

    @property
    def rows(self) -> int:
        return self.bm + self.tail


def _tiles(form: str, splits: Sequence[int]) -> Iterator[Tile]:
    rows, widths, shares = {
        "pointer": (((16, 0), (32, 0), (64, 0), (128, 0), (256, 0)), (32, 64, 128, 256), splits),
        # 256 rows spill where a GELU follows
        "tma": (((64, 0), (128, 0), (192, 0)), (64, 128, 256), (1,)),
        "swap_ab": (((64, 16), (128, 16), (128, 32)), (64, 128, 256), splits),
    }[form]
    return (Tile(form, bm, tail, bn, share) for (bm, tail), bn, share in itertools.product(rows, widths, shares))


def _pipelines(tile: Tile, itemsize: int, shared_limit: int) -> Iterator[GemmConfig]:
    """The ways to run one tile: warps that hold its accumulator, and the deepest pipelines that fit."""
    for bk in (64, 32, 128) if itemsize == 2 else (32, 16):
        for warps in (8, 4):
            if not 512 * warps // 4 <= tile.rows * tile.bn <= _ACCUMULATOR_REGISTERS * warps * 32:
                continue
            fitting = [
                config
                for stages in (5, 4, 3, 2)
                if (
                    config := GemmConfig(tile.bm, tile.bn, bk, 8, warps, stages, tile.splits, tile.form, tile.tail)
                ).shared_bytes(itemsize)
                <= shared_limit
            ]
            yield from fitting[:2]


def forms_for(problem: Problem, arch: str, itemsize: int) -> tuple[str, ...]:
    """The kernels that can run a problem on an architecture."""
    if not has_tma(arch, itemsize) or problem.stage.merge_in > 1 or problem.wgrad:
        return ("pointer",)
    return ("tma", "pointer") if problem.num_blocks > 1 else ("tma", "swap_ab", "pointer")


def cost(bm: int, bn: int, splits: int, m: int, n: int, k: int, multiprocessors: int) -> float:
    """Relative time of a tile: waves of programs, times what one does.

    A program multiplies and adds bm * bn * k / splits times and reads (bm + bn) * k / splits elements, each worth 64 of
    those; a split one also writes its part, and the last reads them all.
    """
    programs = math.ceil(m / bm) * math.ceil(n / bn) * splits
    reduction = 64 * 2 * splits * bm * bn if splits > 1 else 0
    return math.ceil(programs / multiprocessors) * ((bm * bn + 64 * (bm + bn)) * k / splits + reduction)
