"""Converters: python -m llava_integration.convert official|llava SRC DST.

    official    the released LLaVA-STF checkpoint -> a folder that from_pretrained reads
    llava       any LLaVA-1.5 folder of transformers -> a warm-started LLaVA-STF folder

Tensor by tensor, into safetensors of at most 5 GB, and nothing at DST until it is whole.
"""

from .errors import ConversionError
from .llava import convert_llava
from .official import convert_official
from .report import Report

__all__ = ["ConversionError", "Report", "convert_llava", "convert_official"]
