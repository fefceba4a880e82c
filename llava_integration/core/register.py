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


def register(config: type[Config], model: type, generator: type, processor: type, *, stock: Any) -> None:
    """Make the family of `stock`, a ForConditionalGeneration of transformers, known; again changes nothing.

    A class outside transformers inherits no renames of tensors, and language_model.model.* of older checkpoints would
    be lost: ours are those of the stock classes.
    """
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
    stock_model = stock.__name__.replace("ForConditionalGeneration", "Model")
    for ours, theirs in ((config.model_type, stock.config_class.model_type), (model.__name__, stock_model)):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
        _register_with_liger(ours, theirs)
    for package in _packages():
        for cls in (config, model, generator, processor):
            setattr(package, cls.__name__, cls)


def _packages() -> list[ModuleType]:
    """All that somebody has imported as `transformers`: vLLM, TRL and `transformers serve` ask it for a model by name.

    Its own processing_utils runs its __init__ once more, and leaves another module object in sys.modules.
    """
    held = [getattr(module, "__dict__", {}).get("transformers") for module in [*sys.modules.values()]]
    found = [module for module in held if isinstance(module, ModuleType) and module.__name__ == "transformers"]
    return [sys.modules["transformers"], *found]


def _register_with_liger(ours: str, theirs: str) -> None:
    """Liger-Kernel patches a model by its model_type: ours as the stock family's, where it is installed."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as patches
    except ImportError:
        return
    if theirs in patches:
        patches[ours] = patches[theirs]
