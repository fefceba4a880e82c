"""The loader that trust_remote_code=True takes, for programs in which `import llava_integration` cannot be added.

The file holds subclasses, not names: transformers copies the file of a class that it loaded so when the model is saved
again, and the copy has to be complete. The installed llava_integration does the work.
"""

import json
from pathlib import Path

LOADER_FILE = "llava_stf_auto.py"
MODULE = LOADER_FILE.removesuffix(".py")

LOADER = '''"""LLaVA-STF for trust_remote_code=True; needs the stf-kernels package, which provides llava_integration."""

import llava_integration
from transformers import AutoProcessor


class LlavaStfConfig(llava_integration.LlavaStfConfig):
    pass


class LlavaStfModel(llava_integration.LlavaStfModel):
    config: LlavaStfConfig
    config_class = LlavaStfConfig


class LlavaStfForConditionalGeneration(llava_integration.LlavaStfForConditionalGeneration):
    config: LlavaStfConfig
    config_class = LlavaStfConfig


class LlavaStfProcessor(llava_integration.LlavaStfProcessor):
    _auto_class = "AutoProcessor"

    def to_dict(self, *args, **kwargs):
        """transformers writes no auto_map of a processor."""
        return super().to_dict(*args, **kwargs) | {"auto_map": {"AutoProcessor": "llava_stf_auto.LlavaStfProcessor"}}


# Once a model is loaded the package's processor is known by its name, and would be taken instead.
AutoProcessor.register(llava_integration.LlavaStfConfig, LlavaStfProcessor, exist_ok=True)
'''

MODEL_CLASSES = {
    "AutoConfig": "LlavaStfConfig",
    "AutoModel": "LlavaStfModel",
    "AutoModelForImageTextToText": "LlavaStfForConditionalGeneration",
}


def write_auto_map(folder: Path) -> None:
    """Add the loader to `folder` and name it in config.json and, where there is a processor, processor_config.json."""
    (folder / LOADER_FILE).write_text(LOADER, encoding="utf-8")
    _add(folder / "config.json", MODEL_CLASSES)
    if (folder / "processor_config.json").is_file():
        _add(folder / "processor_config.json", {"AutoProcessor": "LlavaStfProcessor"})


def _add(file: Path, classes: dict[str, str]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
