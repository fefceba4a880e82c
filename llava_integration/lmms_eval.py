"""LLaVA-STF in lmms-eval: python -m lmms_eval --model llava_stf --model_args pretrained=FOLDER --tasks ..."""

from types import SimpleNamespace

from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.models.simple.llava_hf import model_map
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from .clients import check_folder, check_version


class LlavaStf(LlavaHf):
    """lmms-eval's `llava_hf`, its options and its batches of one, with the model and processor of `pretrained`."""

    def __init__(self, pretrained: str, **options) -> None:
        check_version("lmms-eval")
        check_folder(pretrained)
        model_map[AutoConfig.from_pretrained(pretrained).model_type] = SimpleNamespace(from_pretrained=_load)
        super().__init__(pretrained, **options)


def _load(pretrained: str, *, device_map: str, **options) -> nn.Module:
    """Without a device map lmms-eval says "", which transformers refuses."""
    return AutoModelForImageTextToText.from_pretrained(pretrained, device_map=device_map or None, **options)
