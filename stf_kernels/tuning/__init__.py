"""Kernel configurations: measured tables per GPU, a heuristic where they are silent, and the look-up of both."""

from .config import GemmConfig
from .heuristic import SHARED_MEMORY_LIMIT, default_config, smallest
from .launches import is_default as launches_by_default
from .lookup import choose, choose_wgrad, reject

__all__ = [
    "SHARED_MEMORY_LIMIT",
    "GemmConfig",
    "choose",
    "choose_wgrad",
    "default_config",
    "launches_by_default",
    "reject",
    "smallest",
]
