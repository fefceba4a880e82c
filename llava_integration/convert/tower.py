"""The vision tower: geometry from a local folder or a known name, weights from the checkpoint or that folder."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import CLIPVisionConfig, LlavaConfig, PreTrainedConfig, SiglipVisionConfig

from .checkpoint import Entries, open_weights, read_json, weights_file
from .report import CONFIG, ConversionError, blamed_on

CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
KNOWN = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}  # pixels a side
PREFIX = "model.vision_tower."


@dataclass(frozen=True)
class Tower:
    """`folder` is None for a tower known by its name only."""

    config: PreTrainedConfig
    folder: Path | None
    name: str

    def weights(self) -> Entries:
        """The folder's vision tensors under the model's names; those of a text tower are not taken."""
        if self.folder is None or weights_file(self.folder) is None:
            raise ConversionError(f"SRC: found no weights of the vision tower {self.name}; give --vision-tower DIR")
        entries = open_weights(self.folder, "--vision-tower")
        inner = "vision_model." if any(name.startswith("vision_model.") for name in entries) else ""
        named = {name: replace(entry, name=f"{self.name}: {name}") for name, entry in entries.items()}
        return {PREFIX + name.removeprefix(inner): entry for name, entry in named.items() if name.startswith(inner)}


def tower_name(name: str) -> str:
    """vision_tower.vision_tower.vision_model.X, with or without `model.` and the inner two -> model.vision_tower.X."""
    return PREFIX + re.sub(r"^(?:model\.)?(?:vision_tower\.)+(?:vision_model\.)?", "", name)


def find_tower(named: str | None, src: Path, option: Path | None) -> Tower:
    """The tower of --vision-tower, or that config.json's mm_vision_tower names: a local folder or a known CLIP."""
    if option is not None:
        if not (option / "config.json").is_file():
            raise ConversionError(f"--vision-tower: expected a folder with config.json, got {option}")
        return Tower(read_config(option), option, option.name)
    if not named or not isinstance(named, str):
        raise ConversionError(f"{CONFIG}: mm_vision_tower: expected a name, got {named!r}; give --vision-tower DIR")
    for folder in (Path(named), src / named, src.parent / named):
        if (folder / "config.json").is_file():
            return Tower(read_config(folder), folder, folder.name)
    name = Path(named).name
    if name not in KNOWN:
        what = f"{named!r} is neither a local folder nor one of {', '.join(KNOWN)}"
        raise ConversionError(f"{CONFIG}: mm_vision_tower: {what}; give --vision-tower DIR")
    config = LlavaConfig().vision_config  # CLIP-L
    config.image_size = KNOWN[name]
    return Tower(config, None, name)


def read_config(folder: Path) -> PreTrainedConfig:
    """The vision configuration in the folder of a CLIP or SigLIP model, whole or vision tower alone."""
    file = folder / "config.json"
    kind = read_json(file).get("model_type")
    if not isinstance(kind, str) or kind.removesuffix("_vision_model") not in CONFIGS:
        raise ConversionError(f"{file}: expected the vision tower of CLIP or SigLIP, got {kind!r}")
    with blamed_on(str(file)):
        config = CONFIGS[kind.removesuffix("_vision_model")].from_pretrained(folder, local_files_only=True)
        if not 1 <= config.patch_size <= config.image_size:
            raise ValueError(f"patch_size {config.patch_size} for images of {config.image_size}")
    return config
