"""For programs that load LLaVA-STF folders by themselves: their entry points, and what their users read in one sentence
before it fails in many.
"""

import importlib.metadata
import json
import warnings
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TESTED = {"lmms-eval": "0.7.3", "trl": "1.16.0"}  # the versions of .ci/*.txt


def check_version(package: str) -> None:
    """A warning where another version of `package` is installed than the tests ran with."""
    found, tested = importlib.metadata.version(package), TESTED[package]
    if found != tested:
        advice = f"if something fails: pip install {package}=={tested}"
        warnings.warn(f"stf-kernels was tested with {package} {tested}, this is {found}; {advice}", stacklevel=3)


def check_folder(folder: str | Path) -> None:
    """ValueError unless `folder` holds an LLaVA-STF and its processor; the name of a repository is not checked."""
    config, processor = Path(folder, "config.json"), Path(folder, "processor_config.json")
    if not Path(folder).is_dir():
        return
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind not in CONFIG_MAPPING or not CONFIG_MAPPING[kind].__module__.startswith(f"{__package__}."):
        got = f"model_type {kind!r}" if config.is_file() else "no config.json"
        remedy = "python -m llava_integration.convert llava SRC DST makes one of a stock LLaVA"
        raise ValueError(f"{folder}: expected a LLaVA-STF model, got {got}; {remedy}")
    if not processor.is_file():
        remedy = "LlavaStfProcessor.from_llava(AutoProcessor.from_pretrained(STOCK)).save_pretrained(FOLDER) writes it"
        raise ValueError(f"{folder}: found no processor_config.json, so prompts cannot be prepared; {remedy}")


def lmms_eval_manifest():
    """The entry point in lmms_eval.models; the class itself is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_stf", chat_class_path="llava_integration.lmms_eval.LlavaStf")
