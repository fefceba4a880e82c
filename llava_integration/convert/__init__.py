"""Converters: python -m llava_integration.convert official|llava SRC DST.

    official    the released LLaVA-STF checkpoint -> a folder that from_pretrained reads
    llava       any LLaVA-1.5 folder of transformers -> a warm-started LLaVA-STF folder

    official.py, llava.py    the two commands: which tensor goes where, what the configuration says
    base.py                  official checkpoints that need another one: LoRA, a pretrained projector
    checkpoint.py            reading weights; matching them with the tensors of the model
    tower.py                 the vision tower: known names, local folders
    processor.py             tokenizer, image processor, chat template
    folder.py                writing everything, whole or not at all
    auto_map.py              code for trust_remote_code=True
    report.py                the error, the report, the model card

Tensor by tensor, into safetensors of at most 2 GB, and nothing at DST until it is whole.
"""

from typing import TYPE_CHECKING

from stf_kernels.command import lazy

if TYPE_CHECKING:
    from .llava import convert_llava
    from .official import convert_official
    from .report import ConversionError, Report

__all__ = ["ConversionError", "Report", "convert_llava", "convert_official"]
__getattr__ = lazy(__name__, "llava", "official", "report")  # the command answers --help before torch is imported
