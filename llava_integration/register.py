"""Make transformers' Auto classes and its checkpoint loader know LLaVA-STF."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration import LlavaStfConfig
from .modeling import LlavaStfForConditionalGeneration, LlavaStfModel
from .processing import LlavaStfProcessor


def register() -> None:
    """Register config, models, processor and the checkpoint renames of LLaVA; calling it again changes nothing."""
    AutoConfig.register(LlavaStfConfig.model_type, LlavaStfConfig, exist_ok=True)
    AutoModel.register(LlavaStfConfig, LlavaStfModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(LlavaStfConfig, LlavaStfForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaStfConfig, LlavaStfProcessor, exist_ok=True)
    # A class outside transformers inherits no renames: language_model.model.* of older LLaVA checkpoints would be lost.
    for ours, theirs in ((LlavaStfConfig.model_type, "llava"), (LlavaStfModel.__name__, "LlavaModel")):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
