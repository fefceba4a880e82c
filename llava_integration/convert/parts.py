"""What an official checkpoint is made of: a whole one, a pretrained projector and its base, or LoRA and its base."""

from dataclasses import dataclass
from pathlib import Path

from . import lora
from .checkpoint import Entries, open_file, open_weights, read_json, weights_file
from .errors import ConversionError
from .geometry import projector_name

PRETRAIN_FILE = "mm_projector.bin"


@dataclass(frozen=True)
class Parts:
    """What SRC and its base hold together; `folders` in the order in which files are looked for."""

    entries: Entries
    config: dict
    folders: list[Path]
    form: str


def read_parts(src: Path, base: Path | None) -> Parts:
    """The tensors of SRC, merged into or laid over those of its base where it has one; ConversionError otherwise."""
    if lora.is_lora(src):
        base = _base(src, base, read_json(src / lora.CONFIG_FILE).get("base_model_name_or_path"), "a LoRA adapter")
        entries = lora.merge(src, _plain(open_weights(base, "--base")))
        return Parts(entries, _json(src, base), [src, base], "LoRA adapter merged into its base")
    if weights_file(src) is not None:
        if base is not None:
            raise ConversionError("--base: SRC is a whole checkpoint, which takes no base; leave the option out")
        return Parts(_plain(open_weights(src)), _json(src), [src], "whole checkpoint")
    if (src / PRETRAIN_FILE).is_file():
        base = _base(src, base, None, f"{PRETRAIN_FILE} alone")
        projector = open_file(src / PRETRAIN_FILE)
        strange = [name for name in projector if projector_name(name) is None]
        if strange:
            raise ConversionError(
                f"{src / PRETRAIN_FILE}: expected the tensors of mm_projector and mm_projector_crosslayer, "
                f"got {', '.join(strange[:3])}"
            )
        # The base may be a LLaVA with a projector of its own: only the new one counts.
        entries = {
            name: entry for name, entry in _plain(open_weights(base, "--base")).items() if not projector_name(name)
        }
        return Parts(entries | projector, _json(src, base), [src, base], "projector of a pretraining, with its base")
    open_weights(src)  # says what is missing
    raise AssertionError("unreachable")


def _base(src: Path, given: Path | None, named: str | None, what: str) -> Path:
    if given is not None:
        return given
    for folder in (Path(named), src / named) if named else ():
        if folder.is_dir():
            return folder
    raise ConversionError(
        f"--base: SRC is {what} and its base {f'{named} ' if named else ''}is not a local folder; "
        "name the folder of the language model with --base DIR"
    )


def _json(*folders: Path) -> dict:
    """The first config.json that has the language model's fields, under the first one's own."""
    contents = [read_json(folder / "config.json") for folder in folders if (folder / "config.json").is_file()]
    if not contents:
        raise ConversionError(f"SRC: expected config.json in {' or '.join(map(str, folders))}, found none")
    merged: dict = {}
    for content in reversed(contents):
        merged |= content
    return merged


def _plain(entries: Entries) -> Entries:
    return {lora.plain(name): entry for name, entry in entries.items()}
