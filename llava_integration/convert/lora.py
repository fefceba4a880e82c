"""LoRA adapters merged into their base: W + scale * B A, in fp32, when the tensor is read.

scale = alpha / r, or alpha / sqrt(r) with use_rslora; r is the adapter's own, alpha may differ per module.
"""

import math
import re
from pathlib import Path

from torch import Tensor

from .checkpoint import Entries, Entry, open_file, read_json
from .errors import ConversionError, blamed_on

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS_FILE = "non_lora_trainables.bin"
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ move part of it into the factors.
KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


def is_lora(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def plain(name: str) -> str:
    """A tensor's name without the wrappers of PEFT, DeepSpeed and DataParallel."""
    return re.sub(r"^(?:module\.)?(?:base_model\.model\.(?=model\.|lm_head\.))?(?:module\.)?", "", name)


def merge(folder: Path, base: Entries) -> Entries:
    """`base` with the adapter of `folder` merged and its other trained tensors in place of the base's."""
    config = _config(folder)
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ConversionError(f"SRC: expected {' or '.join(WEIGHT_FILES)} beside {CONFIG_FILE}, found neither")
    factors: dict[str, dict[str, Entry]] = {}
    merged = dict(base)
    for name, entry in open_file(file).items():
        found = FACTOR.match(plain(name))
        if found:
            factors.setdefault(found["module"], {})[found["side"]] = entry
        elif "lora_" in name or plain(name) not in base:
            raise ConversionError(
                f"{file}: {name} is neither a LoRA factor of a linear layer nor a tensor of the base; merge it with "
                "PEFT first"
            )
        else:
            merged[plain(name)] = entry
    for module, pair in factors.items():
        merged[f"{module}.weight"] = _merged(module, pair, base, config, file)
    if (folder / OTHERS_FILE).is_file():
        merged |= {plain(name): entry for name, entry in open_file(folder / OTHERS_FILE).items()}
    return merged


def _config(folder: Path) -> dict:
    config = read_json(folder / CONFIG_FILE)
    unsupported = [name for name in ("use_dora", "lora_bias") if config.get(name)]
    if (start := config.get("init_lora_weights")) not in KEEP_THE_BASE:
        unsupported.append(f"init_lora_weights {start!r}, which changes the base")
    if config.get("peft_type") != "LORA" or unsupported:
        got = ", ".join(unsupported) or f"peft_type {config.get('peft_type')!r}"
        raise ConversionError(
            f"{folder / CONFIG_FILE}: expected plain LoRA, got {got}; merge the adapter with PEFT first"
        )
    return config


def _merged(module: str, pair: dict[str, Entry], base: Entries, config: dict, file: Path) -> Entry:
    target = base.get(f"{module}.weight")
    if target is None:
        raise ConversionError(f"{file}: adapts {module}, which the base does not have; name the right one with --base")
    if pair.keys() != {"A", "B"}:
        raise ConversionError(f"{file}: expected lora_A and lora_B of {module}, got lora_{next(iter(pair))} only")
    transposed = bool(config.get("fan_in_fan_out"))
    first, second = pair["A"], pair["B"]
    shape = (second.shape[0], first.shape[1])
    if first.shape[0] != second.shape[1] or (shape[::-1] if transposed else shape) != target.shape:
        raise ConversionError(
            f"{file}: the factors of {module}, {list(first.shape)} and {list(second.shape)}, do not fit the base's "
            f"{list(target.shape)}; name the right base with --base"
        )
    with blamed_on(f"SRC: {CONFIG_FILE}", "get the file again"):
        scale = float(_scale(module, first.shape[0], config))

    def read() -> Tensor:
        delta = second.read().float() @ first.read().float()
        return target.read().float().add(delta.T if transposed else delta, alpha=scale).to(target.dtype)

    return Entry(target.shape, target.dtype, read, file.name, "merged")


def _scale(module: str, rank: int, config: dict) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
