"""From a product to a kernel configuration; what an import needs, and nothing that measures.

config.py      GemmConfig: tile sizes and compiler options
model.py       the tiles of each architecture, and the one that serves when no table matches: change a tile size here
tables.py      measured tables of a device, tables/<device>.json
cache.py       what was selected on a device at first use, kept for the next process
selection.py   from a product to a configuration: table, cache or model; and what becomes of one that does not run
"""

from .config import GemmConfig
from .model import SHARED_MEMORY_LIMIT, default_config, smallest
from .selection import choose, listening, reject, settled, uses_tf32
from .tables import device_identity, device_slug

__all__ = [
    "SHARED_MEMORY_LIMIT",
    "GemmConfig",
    "choose",
    "default_config",
    "device_identity",
    "device_slug",
    "listening",
    "reject",
    "settled",
    "smallest",
    "uses_tf32",
]
