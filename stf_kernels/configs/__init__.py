"""From a product to a kernel configuration; what an import needs, and nothing that measures.

config.py      GemmConfig: tile sizes and compiler options
model.py       the tiles of each architecture, and the one that serves when no table matches: change a tile size here
tables.py      measured tables of a device, tables/<device>.json
selection.py   from a product to a configuration, and what becomes of one that does not run
"""

from .config import GemmConfig
from .model import SHARED_MEMORY_LIMIT, default_config, smallest
from .selection import choose, reject
from .tables import device_identity, device_slug

__all__ = [
    "SHARED_MEMORY_LIMIT",
    "GemmConfig",
    "choose",
    "default_config",
    "device_identity",
    "device_slug",
    "reject",
    "smallest",
]
