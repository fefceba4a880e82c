"""Official checkpoints that need another one: LoRA adapters and a pretrained projector, with their base.

    LoRA        adapter_config.json, adapter_model.*    W + scale * B A, in fp32, when the tensor is read
                non_lora_trainables.bin                 other trained tensors, in place of the base's
    pretrain    mm_projector.bin                        the projector alone

scale = alpha / r, or alpha / sqrt(r) with use_rslora; r is the adapter's own, alpha may differ per module.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .checkpoint import Entries, Entry, open_file, open_weights, read_json, rename, weights_file
from .report import ConversionError, blamed_on

LORA_CONFIG, PRETRAIN_FILE = "adapter_config.json", "mm_projector.bin"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LORA_OTHERS_FILE = "non_lora_trainables.bin"
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ move part of it into the factors.
KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


class Parts(NamedTuple):
    """What SRC and its base hold together."""

    entries: Entries
    config: dict
    folders: list[Path]  # in the order in which files are looked for
    form: str


def read_parts(src: Path, base: Path | None, projector_name: Callable[[str], str | None]) -> Parts:
    """The tensors of SRC, merged into or laid over those of its base where it has one; ConversionError otherwise."""
    lora = (src / LORA_CONFIG).is_file()
    if not lora and (weights_file(src) is not None or not (src / PRETRAIN_FILE).is_file()):
        entries = rename(open_weights(src), _plain)
        if base is not None:
            raise ConversionError("--base: SRC is a whole checkpoint, which takes no base; leave the option out")
        return Parts(entries, _config(src), [src], "whole checkpoint")
    named = read_json(src / LORA_CONFIG).get("base_model_name_or_path") if lora else None
    if base is None and named:
        base = next((folder for folder in (Path(named), src / named) if folder.is_dir()), None)
    if base is None:
        what = "a LoRA adapter" if lora else f"{PRETRAIN_FILE} alone"
        where = f"{named} is not a local folder" if named else "is not named"
        raise ConversionError(f"--base: SRC is {what} and its base {where}; name the folder of the language model")
    entries, folders = rename(open_weights(base, "--base"), _plain), [src, base]
    if lora:
        return Parts(_merge_lora(src, entries), _config(*folders), folders, "LoRA adapter merged into its base")
    projector = open_file(src / PRETRAIN_FILE)
    if strange := [name for name in projector if projector_name(name) is None]:
        raise ConversionError(f"{src / PRETRAIN_FILE}: expected the tensors of mm_projector alone, got {strange[0]}")
    # The base may be a LLaVA with a projector of its own: only the new one counts.
    entries = {name: entry for name, entry in entries.items() if not projector_name(name)} | projector
    return Parts(entries, _config(*folders), folders, "projector of a pretraining, with its base")


def _config(*folders: Path) -> dict:
    """config.json of the last folder, under that of the one before."""
    contents = [read_json(folder / "config.json") for folder in folders if (folder / "config.json").is_file()]
    if not contents:
        raise ConversionError(f"SRC: expected config.json in {' or '.join(map(str, folders))}, found none")
    return {name: value for content in reversed(contents) for name, value in content.items()}


def _plain(name: str) -> str:
    """A tensor's name without the wrappers of PEFT, DeepSpeed and DataParallel."""
    return re.sub(r"^(?:module\.)?(?:base_model\.model\.(?=model\.|lm_head\.))?(?:module\.)?", "", name)


def _merge_lora(folder: Path, base: Entries) -> Entries:
    """`base` with the adapter of `folder` merged and its other trained tensors in place of the base's."""
    config = read_json(folder / LORA_CONFIG)
    unsupported = [name for name in ("use_dora", "lora_bias") if config.get(name)]
    if (start := config.get("init_lora_weights")) not in KEEP_THE_BASE:
        unsupported.append(f"init_lora_weights {start!r}, which changes the base")
    if config.get("peft_type") != "LORA" or unsupported:
        got = ", ".join(unsupported) or f"peft_type {config.get('peft_type')!r}"
        raise ConversionError(f"SRC: {LORA_CONFIG}: expected plain LoRA, got {got}; merge the adapter with PEFT first")
    file = next((folder / name for name in LORA_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ConversionError(f"SRC: expected {' or '.join(LORA_FILES)} beside {LORA_CONFIG}, found neither")
    factors: dict[str, dict[str, Entry]] = {}
    merged = dict(base)
    for name, entry in open_file(file).items():
        if found := FACTOR.match(_plain(name)):
            factors.setdefault(found["module"], {})[found["side"]] = entry
        elif "lora_" in name or _plain(name) not in base:
            raise ConversionError(f"{file}: {name} is neither a LoRA factor nor of the base; merge it with PEFT first")
        else:
            merged[_plain(name)] = entry
    for module, pair in factors.items():
        merged[f"{module}.weight"] = _merged(module, pair, base, config, file)
    if (folder / LORA_OTHERS_FILE).is_file():
        merged |= rename(open_file(folder / LORA_OTHERS_FILE), _plain)
    return merged


def _merged(module: str, pair: dict[str, Entry], base: Entries, config: dict, file: Path) -> Entry:
    target = base.get(f"{module}.weight")
    if target is None:
        raise ConversionError(f"{file}: adapts {module}, which the base does not have; name the right one with --base")
    if pair.keys() != {"A", "B"}:
        raise ConversionError(f"{file}: expected lora_A and lora_B of {module}, got lora_{next(iter(pair))} only")
    first, second = pair["A"], pair["B"]
    if first.shape[0] != second.shape[1] or (second.shape[0], first.shape[1]) != target.shape:
        raise ConversionError(f"{file}: the factors of {module} do not fit the base's {list(target.shape)}; see --base")
    with blamed_on(f"SRC: {LORA_CONFIG}"):
        own = (config.get("alpha_pattern") or {}).items()
        alphas = [alpha for pattern, alpha in own if re.fullmatch(rf"(.*\.)?({pattern})", module)]
        alpha, rank = alphas[0] if alphas else config.get("lora_alpha", 8), first.shape[0]
        scale = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def add(weight: Tensor) -> Tensor:
        return weight.float().add(second.read().float() @ first.read().float(), alpha=scale).to(weight.dtype)

    return replace(target, origin=file.name).then("merged", add)
