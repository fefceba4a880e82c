"""What trust_remote_code=True loads, for programs in which `import llava_integration` cannot be added.

    llava_stf_auto.py    the classes of the package where it is installed, of the files beside it where it is not
    llava_stf*.py        the package's model, configuration and processor, with the projector in plain torch
                         or, where STF_KERNELS_HUB names one, of a build on the kernels hub

The loader holds subclasses, not names: when such a model is saved again, transformers copies the file of its class
with all that it imports relatively.
"""

import inspect
import json
import re
from pathlib import Path

from ..core.register import Family

RELATIVE = re.compile(r"^from \.([\w.]+) import", re.MULTILINE)
MODULE = "llava_stf_auto"
KERNELS = "from stf_kernels import CompactTokenProjector"
PLAIN = "from .plain_projector import hub_or_plain as CompactTokenProjector"

# The code of LLaVA-STF's; another family's has its names.
LOADER = Path(__file__).with_name("loader.txt")
GENERATOR = "ForConditionalGeneration"
MODEL_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForImageTextToText": GENERATOR}


def write_auto_map(folder: Path, family: Family) -> None:
    """Add the code to `folder` and name it in config.json and, where there is a processor, processor_config.json."""
    own, prefix = Path(inspect.getfile(family.generator)), family.generator.__name__.removesuffix(GENERATOR)
    loader = LOADER.read_text(encoding="utf-8").replace("LlavaStf", prefix).replace("FILE", _flat_name(own.stem))
    (folder / f"{MODULE}.py").write_text(loader, encoding="utf-8")
    for name, source in _sources(own).items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    named = {"config.json": {auto: prefix + kind for auto, kind in MODEL_CLASSES.items()}}
    named["processor_config.json"] = {"AutoProcessor": family.processor.__name__}
    for file, classes in named.items():
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            content["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
            (folder / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sources(path: Path) -> dict[str, str]:
    """A file and all files of this package that it imports, under flat names: transformers copies one folder.

    Each needs nothing but torch, transformers and its neighbours in the folder.
    """
    source = path.read_text(encoding="utf-8").replace(KERNELS, PLAIN)
    found = {_flat_name(path.stem): RELATIVE.sub(lambda match: f"from .{_flat_name(match[1])} import", source)}
    for module in RELATIVE.findall(source):
        found |= _sources(path.parent.joinpath(*module.split(".")).with_suffix(".py"))
    return found


def _flat_name(module: str) -> str:
    """tower, core.tower -> llava_stf_tower"""
    name = module.rpartition(".")[2]
    return name if name.startswith("llava_stf") else f"llava_stf_{name}"
