"""From a product to a kernel configuration; what an import needs, and nothing that measures.

config.py      GemmConfig: tile sizes and compiler options
model.py       the tiles of each architecture, and the one that serves when no table matches: change a tile size here
tables.py      what was measured on a device: its table, tables/<device>.json, and the user's cache
selection.py   from a product to a configuration: table, cache or model; and what becomes of one that does not run
"""

from .config import GemmConfig
from .model import SHARED_MEMORY_LIMIT, default_config
from .selection import Gemm, Measure, choose, listening, reject, uses_tf32
from .tables import device_identity, device_slug

__all__ = [
    "SHARED_MEMORY_LIMIT",
    "Gemm",
    "GemmConfig",
    "Measure",
    "choose",
    "default_config",
    "device_identity",
    "device_slug",
    "listening",
    "reject",
    "uses_tf32",
]
