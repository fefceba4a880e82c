"""LLaVA-STF in transformers: importing this package registers its families with the Auto classes.

LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision at a quarter of the image tokens, arXiv 2506.07138; `from_llava` starts each
exactly from any stock checkpoint. A family is a file of this folder: llava_next_stf.py has LlavaNextStfConfig,
...Model, ...ForConditionalGeneration and ...Processor, which are names of this package.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from stf_kernels.command import STARTED, lazy, missing

if TYPE_CHECKING:
    from .llava_stf import LlavaStfConfig as LlavaStfConfig
    from .llava_stf import LlavaStfForConditionalGeneration as LlavaStfForConditionalGeneration
    from .llava_stf import LlavaStfModel as LlavaStfModel
    from .processing import LlavaStfProcessor as LlavaStfProcessor
    from .runner import PrefillRunner as PrefillRunner
    from .warm_start import from_llava as from_llava

_FAMILIES = sorted(file.stem for file in Path(__file__).parent.glob("*_stf.py"))
_KINDS = ("Config", "ForConditionalGeneration", "Model", "Processor")

__all__ = [family.title().replace("_", "") + kind for family in _FAMILIES for kind in _KINDS]
__all__ += ["PrefillRunner", "from_llava"]

__getattr__ = lazy(__name__, *_FAMILIES, "runner", "warm_start")
if not STARTED:  # a command registers when it asks for a name
    try:
        __getattr__("from_llava")
    except ImportError as error:
        if (sentence := missing(error)) is None:
            raise
        raise ImportError(f"llava_integration: {sentence}", name=error.name) from error
