"""LLaVA-NeXT (LLaVA-1.6) with a compact projector: of every tile, a quarter of the tokens."""

from huggingface_hub.dataclasses import strict
from transformers import (
    GenerationMixin,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
)

from .core.config import CompactConfig
from .core.model import CompactGeneration, forward_of
from .core.register import register
from .core.tiles import TiledModel
from .processing import CompactProcessor


@strict
class LlavaNextStfConfig(CompactConfig, LlavaNextConfig):
    model_type = "llava_next_stf"


class LlavaNextStfModel(TiledModel, LlavaNextModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaNextStfConfig
    forward = forward_of(LlavaNextModel)


class LlavaNextStfForConditionalGeneration(CompactGeneration, LlavaNextForConditionalGeneration, GenerationMixin):
    """LlavaNextStfModel with its language modeling head."""

    config: LlavaNextStfConfig
    model_class = LlavaNextStfModel


class LlavaNextStfProcessor(CompactProcessor, LlavaNextProcessor):
    """Image processor and tokenizer in one; `patch_size` is the side of a window in pixels, p * r."""


register(LlavaNextStfForConditionalGeneration, LlavaNextStfProcessor)
