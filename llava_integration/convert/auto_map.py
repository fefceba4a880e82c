"""What trust_remote_code=True loads, for programs in which `import llava_integration` cannot be added.

    llava_stf_auto.py    the classes of the package where it is installed, of the files beside it where it is not
    llava_stf*.py        the package's model, configuration and processor, with the projector in plain torch
                         or, where STF_KERNELS_HUB names one, of a build on the kernels hub

The loader holds subclasses, not names: transformers copies the file of a class that it loaded so when the model is
saved again, with all that it imports relatively, and the copy has to be complete.
"""

import json
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
RELATIVE = re.compile(r"^from (\.[\w.]*) import", re.MULTILINE)
MODULE = "llava_stf_auto"

# Under flat names, and with relative imports only: transformers copies files of one folder.
COPIED = [*sorted((PACKAGE / "core").glob("[a-z]*.py")), PACKAGE / "llava_stf.py", PACKAGE / "processing.py"]
KERNELS = "from stf_kernels import CompactTokenProjector"
PLAIN = "from .plain_projector import hub_or_plain as CompactTokenProjector"

LOADER = '''"""LLaVA-STF for trust_remote_code=True: from the stf-kernels package if installed, else in plain torch."""

import os
import sys

from transformers import AutoProcessor
from transformers.utils import logging

try:
    import llava_integration as stf
except ImportError:
    from .llava_stf import LlavaStfConfig

    stf = sys.modules[LlavaStfConfig.__module__]
    if "STF_KERNELS_HUB" not in os.environ:
        logging.get_logger(__name__).warning("LLaVA-STF: stf-kernels is not installed, so its projector is not fused")


class LlavaStfConfig(stf.LlavaStfConfig):
    pass


class LlavaStfModel(stf.LlavaStfModel):
    config: LlavaStfConfig
    config_class = LlavaStfConfig


class LlavaStfForConditionalGeneration(stf.LlavaStfForConditionalGeneration):
    config: LlavaStfConfig
    config_class = LlavaStfConfig


class LlavaStfProcessor(stf.LlavaStfProcessor):
    _auto_class = "AutoProcessor"

    def to_dict(self, *args, **kwargs):
        """transformers writes no auto_map of a processor."""
        return super().to_dict(*args, **kwargs) | {"auto_map": {"AutoProcessor": "llava_stf_auto.LlavaStfProcessor"}}


# Once a model is loaded the package's processor is known by its name, and would be taken instead.
AutoProcessor.register(stf.LlavaStfConfig, LlavaStfProcessor, exist_ok=True)
'''

MODEL_CLASSES = {"AutoConfig": "LlavaStfConfig", "AutoModel": "LlavaStfModel"}
MODEL_CLASSES |= {"AutoModelForImageTextToText": "LlavaStfForConditionalGeneration"}


def write_auto_map(folder: Path) -> None:
    """Add the code to `folder` and name it in config.json and, where there is a processor, processor_config.json."""
    (folder / f"{MODULE}.py").write_text(LOADER, encoding="utf-8")
    for path in COPIED:
        # A file of the package that needs nothing but torch, transformers and its neighbours in the folder.
        source = path.read_text(encoding="utf-8").replace(KERNELS, PLAIN)
        source = RELATIVE.sub(lambda found: f"from .{_flat_name(found[1])} import", source)
        (folder / f"{_flat_name(path.stem)}.py").write_text(source, encoding="utf-8")
    _add(folder / "config.json", MODEL_CLASSES)
    if (folder / "processor_config.json").is_file():
        _add(folder / "processor_config.json", {"AutoProcessor": "LlavaStfProcessor"})


def _flat_name(module: str) -> str:
    """tower, .tower, .core.tower -> llava_stf_tower"""
    name = module.rpartition(".")[2]
    return name if name.startswith("llava_stf") else f"llava_stf_{name}"


def _add(file: Path, classes: dict[str, str]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
