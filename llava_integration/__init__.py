"""LLaVA-STF in transformers: importing this package registers it with the Auto classes.

LLaVA-1.5 at a quarter of the image tokens, arXiv 2506.07138; `from_llava` starts it exactly from any LLaVA-1.5.
"""

from typing import TYPE_CHECKING

from stf_kernels.command import STARTED, lazy

if TYPE_CHECKING or not STARTED:
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

__getattr__ = lazy(
    __name__, "llava_stf", "processing", "runner", "warm_start"
)  # a command registers when it asks for a name
