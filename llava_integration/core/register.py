"""Make transformers' Auto classes and its checkpoint loader, from_llava and the converters know a family."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import PreTrainedConfig as Config
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto


class Family(NamedTuple):
    """The classes of a family, and the stock ForConditionalGeneration that it starts from."""

    stock: Any
    config: Any
    model: Any
    generator: Any
    processor: Any


_FAMILIES: dict[str, Family] = {}


def families() -> list[Family]:
    """All, by the model_type of the stock one: the files *_stf.py of this package, and who else has registered."""
    for file in Path(__file__).parents[1].glob("*_stf.py"):
        import_module(f"{__package__.rpartition('.')[0]}.{file.stem}")
    return sorted(_FAMILIES.values(), key=lambda family: family.stock.config_class.model_type)


def family_of(config: Config) -> Family:
    """The one whose configuration this is."""
    return _FAMILIES[config.model_type]


def register(generator: Any, processor: type) -> None:
    """Make the family of `generator`, its ForConditionalGeneration, known; again changes nothing."""
    config, model = generator.config_class, generator.model_class
    stock = next(base for base in generator.__mro__ if base.__module__.startswith("transformers."))
    _FAMILIES[config.model_type] = Family(stock, config, model, generator, processor)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(config, generator, exist_ok=True)
    # Tables of names, by which pipelines and `transformers serve` tell what a model takes.
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type] = generator.__name__
    modeling_auto.MODEL_MAPPING_NAMES[config.model_type] = model.__name__
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type] = generator.__name__
    AutoProcessor.register(config, processor, exist_ok=True)
    # Renames of older checkpoints' tensors, which a class outside transformers does not inherit.
    stock_model = stock.__name__.replace("ForConditionalGeneration", "Model")
    for ours, theirs in ((config.model_type, stock.config_class.model_type), (model.__name__, stock_model)):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
    try:  # Liger-Kernel patches a model by its model_type
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as patches
    except ImportError:
        patches = {}
    if stock.config_class.model_type in patches:
        patches[config.model_type] = patches[stock.config_class.model_type]
    # vLLM, TRL and `transformers serve` ask transformers for a model by name, and its own processing_utils may leave
    # more than one module object of it.
    held = [getattr(module, "__dict__", {}).get("transformers") for module in [*sys.modules.values()]]
    found = [module for module in held if isinstance(module, ModuleType) and module.__name__ == "transformers"]
    for package in [sys.modules["transformers"], *found]:
        for cls in (config, model, generator, processor):
            setattr(package, cls.__name__, cls)
