"""Converters: python -m llava_integration.convert official|llava SRC DST.

    official    the released LLaVA-STF checkpoint -> a folder that from_pretrained reads
    llava       any LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision of transformers -> a warm-started folder of its family

Tensor by tensor, into safetensors of at most 2 GB, and nothing at DST until it is whole. official.py and llava.py say
which tensor goes where; base, tower and processor find what else is needed, checkpoint reads, folder writes.
"""

from typing import TYPE_CHECKING

from stf_kernels.command import lazy

if TYPE_CHECKING:
    from .llava import convert_llava
    from .official import convert_official
    from .report import ConversionError, Report

__all__ = ["ConversionError", "Report", "convert_llava", "convert_official"]
__getattr__ = lazy(__name__, "llava", "official", "report")  # the command answers --help before torch is imported
