"""LLaVA-STF in transformers: importing this package registers it with the Auto classes.

LLaVA-1.5 at a quarter of the image tokens, arXiv 2506.07138; `from_llava` starts it exactly from any LLaVA-1.5.
"""

import importlib
import sys
from typing import TYPE_CHECKING

# argv is ["-m", ...] while Python looks for the module of `python -m`: commands answer --help before torch is imported.
_STARTING = sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)

if TYPE_CHECKING or not _STARTING:
    from .llava_stf import LlavaStfConfig, LlavaStfForConditionalGeneration, LlavaStfModel
    from .processing import LlavaStfProcessor
    from .runner import PrefillRunner
    from .warm_start import from_llava

__all__ = [
    "LlavaStfConfig",
    "LlavaStfForConditionalGeneration",
    "LlavaStfModel",
    "LlavaStfProcessor",
    "PrefillRunner",
    "from_llava",
]


def __getattr__(name: str) -> object:
    """What a command left out at its start."""
    if _STARTING and name in __all__:
        importlib.reload(sys.modules[__name__])
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
