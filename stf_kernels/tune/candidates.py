"""Every configuration that a tile may have: the warps that hold its accumulator, steps, and depths of the pipeline."""

import itertools
from collections.abc import Iterator

from ..configs import GemmConfig

_ACCUMULATOR_REGISTERS = 128  # of a thread

# (rows, rows of the tail), columns, shares of K
_TILES = {
    "tma": (((64, 0), (128, 0), (192, 0)), (64, 128, 256), (1,)),  # 256 rows spill where a GELU follows
    "swap_ab": (((64, 16), (128, 16), (128, 32)), (64, 128, 256), (1, 2, 4, 8)),
    "pointer": (((16, 0), (32, 0), (64, 0), (128, 0), (256, 0)), (32, 64, 128, 256), (1, 2, 4, 8)),
}


def candidates(arch: str, itemsize: int, *, save_pre: bool, wgrad: bool) -> Iterator[GemmConfig]:
    """As selection.menu; what an architecture or a stage cannot run is left out there."""
    pipelines = [*itertools.product((64, 32, 128) if itemsize == 2 else (32, 16), (8, 4), (5, 4, 3, 2))]
    for form, (rows, columns, shares) in _TILES.items():
        for (block_m, tail), block_n, split in itertools.product(rows, columns, shares):
            for block_k, warps, stages in pipelines:
                elements = (block_m + tail) * block_n
                if 512 * warps // 4 <= elements <= _ACCUMULATOR_REGISTERS * warps * 32:
                    yield GemmConfig(block_m, block_n, block_k, 8, warps, stages, split, form, tail)


def tile(config: GemmConfig) -> tuple:
    """A search tries two pipelines of each."""
    return config.form, config.block_m, config.block_n, config.tail_m, config.split_k
