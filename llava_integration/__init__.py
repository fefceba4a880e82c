"""LLaVA-STF in transformers: importing this package registers it with the Auto classes.

LLaVA-1.5 at a quarter of the image tokens, arXiv 2506.07138; `from_llava` starts it exactly from any LLaVA-1.5.
"""

from .configuration import LlavaStfConfig
from .modeling import LlavaStfForConditionalGeneration, LlavaStfModel
from .processing import LlavaStfProcessor
from .register import register
from .runner import PrefillRunner
from .warm_start import from_llava

register()

__all__ = [
    "LlavaStfConfig",
    "LlavaStfForConditionalGeneration",
    "LlavaStfModel",
    "LlavaStfProcessor",
    "PrefillRunner",
    "from_llava",
]
