"""Kernel configurations: measured tables per GPU, a heuristic where they are silent, and the look-up of both.

config.py      GemmConfig: tile sizes and compiler options
heuristic.py   the tiles of each architecture where no table speaks
lookup.py      from a problem to a configuration; the format of a table
launches.py    ways to launch that a table may name
__main__.py    the offline search: candidates.py what is worth measuring, problem_bench.py and launch_bench.py the
               measurement, timing.py its clock, search.py its journal and the table it writes
"""

from .config import GemmConfig
from .heuristic import SHARED_MEMORY_LIMIT, default_config, smallest
from .launches import is_default as launches_by_default
from .lookup import choose, choose_wgrad, gpu_index, reject

__all__ = [
    "SHARED_MEMORY_LIMIT",
    "GemmConfig",
    "choose",
    "choose_wgrad",
    "default_config",
    "gpu_index",
    "launches_by_default",
    "reject",
    "smallest",
]
