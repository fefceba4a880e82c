"""The configurations worth measuring for a problem. The rest is pruned before anything runs:

by rules   what an architecture or a stage cannot run (configs/tables.py), an accumulator over 128 registers a thread
by cost    what the model (configs/model.py) estimates at over twice its best
"""

import itertools
from collections.abc import Iterator

from ..configs import GemmConfig
from ..configs.model import cycles
from ..configs.tables import does_not_suit
from .problems import Problem

_ACCUMULATOR_REGISTERS = 128
_NOT_WORTH_TRYING = 2.0  # times the best estimate

# (rows, rows of the tail), columns, shares of K
_TILES = {
    "tma": (((64, 0), (128, 0), (192, 0)), (64, 128, 256), (1,)),  # 256 rows spill where a GELU follows
    "swap_ab": (((64, 16), (128, 16), (128, 32)), (64, 128, 256), (1, 2, 4, 8)),
    "pointer": (((16, 0), (32, 0), (64, 0), (128, 0), (256, 0)), (32, 64, 128, 256), (1, 2, 4, 8)),
}


def candidates(problem: Problem, m: int, itemsize: int, arch: str, multiprocessors: int) -> list[GemmConfig]:
    """Configurations worth measuring for m rows of A: each tile with its best pipeline, the most promising first, then
    each with its next, so that a search cut short has tried every promising tile."""
    product = problem.product(m)
    tiles, order = [], itertools.count()  # among equals, the one that was listed first
    for form, (rows, columns, shares) in _TILES.items():
        for (block_m, tail), block_n, split in itertools.product(rows, columns, shares):
            pipelines = [
                config
                for config in _pipelines(form, block_m, tail, block_n, split, itemsize)
                if does_not_suit(config, arch, problem.kind, itemsize) is None
            ]
            if pipelines:
                costs = [cycles(config, *product, itemsize, arch, multiprocessors) for config in pipelines]
                tiles.append(sorted(zip(costs, order, pipelines, strict=False)))
    best = min(tile[0][0] for tile in tiles)
    promising = [tile for tile in sorted(tiles) if tile[0][0] <= _NOT_WORTH_TRYING * best]
    turns = itertools.zip_longest(*promising)
    return [entry[-1] for turn in turns for entry in turn if entry is not None]


def _pipelines(form: str, block_m: int, tail: int, block_n: int, split: int, itemsize: int) -> Iterator[GemmConfig]:
    """The ways to run one tile: warps that hold its accumulator, steps, and depths of the pipeline."""
    for block_k, warps, stages in itertools.product((64, 32, 128) if itemsize == 2 else (32, 16), (8, 4), (5, 4, 3, 2)):
        elements = (block_m + tail) * block_n
        if 512 * warps // 4 <= elements <= _ACCUMULATOR_REGISTERS * warps * 32:
            yield GemmConfig(block_m, block_n, block_k, 8, warps, stages, split, form, tail)
