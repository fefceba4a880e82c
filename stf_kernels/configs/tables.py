"""Measured tables: tables/<device-slug>.json, written by `python -m stf_kernels.tune`.

    {"version": 2, "device": "NVIDIA H200", "arch": "sm_90", "commit": ..., "torch": ..., "triton": ...,
     "entries": [{"stage": "concat", "dtype": "bfloat16", "n": 4096, "k": 8192, "m_max": 1152,
                  "provider": "triton", "config": {...}, "us": ..., "rival": ..., "rival_us": ...}, ...]}

An entry serves every M up to m_max that no smaller entry serves; the largest one serves all beyond, unless it is for
few rows by its nature (K split, A and B swapped). `provider` is "torch" where the measurement said that plain torch is
faster; `us`, `rival` and `rival_us` are that measurement: cold-cache microseconds of the entry and of the best rival.
"""

import functools
import json
import os
import re
import warnings
from pathlib import Path

import torch

from .config import GemmConfig, check_fields
from .model import SHARED_MEMORY_LIMIT, has_tma

TABLE_VERSION = 2
WGRAD_STAGES = ("concat_wgrad", "merge_wgrad", "linear_wgrad")
STAGES = ("concat", "merge", "linear", "linear_merge", *WGRAD_STAGES)
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
_FOLDER = Path(__file__).with_name("tables")
_TOP = {"version", "device", "arch", "commit", "torch", "triton", "entries"}
ENTRY = {"stage", "dtype", "n", "k", "m_max", "provider", "config", "us", "rival", "rival_us"}

# (stage, dtype, n, k) -> (m_max, configuration) in ascending order; None is plain torch.
Table = dict[tuple[str, str, int, int], list[tuple[int, GemmConfig | None]]]


def device_slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200": the name of a device's table and of its folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def device_identity(index: int) -> tuple[str, str]:
    """(slug, architecture) of a GPU: ("nvidia-h200", "sm_90")."""
    properties = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if amd else f"sm_{properties.major}{properties.minor}"
    return device_slug(properties.name), arch


@functools.cache
def multiprocessors(index: int) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def table_path(slug: str) -> Path:
    return _FOLDER / f"{slug}.json"


@functools.cache
def table_of(slug: str, arch: str) -> Table:
    """A device's table; empty where it has none, or one that is refused with a warning."""
    path = table_path(slug)
    if not path.exists():
        return {}
    try:
        return parse_table(path.read_text(encoding="utf-8"), arch)
    except Exception as error:  # whatever nonsense it holds must not end a user's call
        warnings.warn(f"stf_kernels: {path.name} is not used, the model serves instead. {error}", stacklevel=2)
        return {}


def parse_table(text: str, arch: str) -> Table:
    """Entries by (stage, dtype, n, k), sorted by m_max.  ValueError names what is unknown, wrong or cannot run."""
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"table: expected an object, got {type(table).__name__}")
    if table.get("version") != TABLE_VERSION:
        raise ValueError(f"version: expected {TABLE_VERSION}, got {table.get('version')!r}")
    check_fields("table", table, _TOP)
    if table["arch"] != arch:
        raise ValueError(f"arch: the table is for {table['arch']!r}, this device is {arch!r}")
    parsed: Table = {}
    for number, entry in enumerate(table["entries"]):
        config = check_entry(f"entries[{number}]", entry, arch)
        key = entry["stage"], entry["dtype"], entry["n"], entry["k"]
        parsed.setdefault(key, []).append((entry["m_max"], config))
    for choices in parsed.values():
        choices.sort(key=lambda pair: pair[0])
    return parsed


def check_entry(where: str, entry: dict, arch: str, known: set[str] = ENTRY) -> GemmConfig | None:
    """The configuration of an entry, None for plain torch; ValueError names what is wrong."""
    check_fields(where, entry, known)
    for name, choices in (("stage", STAGES), ("dtype", DTYPES), ("provider", ("triton", "torch"))):
        if entry[name] not in choices:
            raise ValueError(f"{where}.{name}: expected one of {list(choices)}, got {entry[name]!r}")
    for name in ("n", "k", "m_max"):
        if type(entry[name]) is not int or entry[name] < 1:
            raise ValueError(f"{where}.{name}: expected a positive int, got {entry[name]!r}")
    if entry["provider"] == "torch":
        return None
    config = GemmConfig.from_dict(entry["config"])
    if reason := does_not_suit(config, arch, entry["stage"], DTYPES[entry["dtype"]]):
        raise ValueError(f"{where}.config: {reason}")
    return config


def does_not_suit(config: GemmConfig, arch: str, stage: str, itemsize: int) -> str | None:
    """Why a configuration cannot run a stage on an architecture, or None."""
    amd, wgrad = arch.startswith("gfx"), stage in WGRAD_STAGES
    threads = config.num_warps * (64 if amd else 32)
    if threads > 1024:
        return f"num_warps: {config} has {threads} threads, a program has at most 1024"
    registers = 512 if amd else 255
    tensor_memory = arch.startswith("sm_10")  # there it is not registers that hold the tile
    if config.rows * config.block_n > registers * threads and not tensor_memory:
        return f"the tile of {config} takes more than {registers} registers a thread"
    if config.split_k > 1 and (amd or wgrad):
        where = "is for NVIDIA GPUs" if amd else f"is not for stage {stage!r}"
        return f"split_k {where}, got {config} for {arch}"
    if (config.form != "pointer" or config.pdl) and not has_tma(arch, itemsize):
        return f"form {config.form!r} (pdl {config.pdl}) is for 16 bit on Hopper and later, got {config} for {arch}"
    dense = stage == "linear" or stage == "linear_merge"
    if (config.form == "swap_ab" and not dense) or (config.form == "tma" and not (dense or stage == "concat")):
        return f"stage {stage!r} has no form {config.form!r}, got {config}"
    need, limit = config.shared_bytes(itemsize), SHARED_MEMORY_LIMIT.get(arch)
    if limit is not None and need > limit:
        return f"{config} needs {need} bytes of shared memory, {arch} has {limit}"
    return None


def shipped_configs(arch: str, dtype: str, *, wgrad: bool) -> list[GemmConfig]:
    """Every configuration that a shipped table of an architecture names for a dtype: of weight gradients, or others."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.json"))]
    found: list[GemmConfig | None] = []
    for table in (parse_table(text, arch) for text in texts if json.loads(text).get("arch") == arch):
        for (stage, entry_dtype, _, _), choices in table.items():
            if entry_dtype == dtype and (stage in WGRAD_STAGES) == wgrad:
                found += [config for _, config in choices]
    return [config for config in dict.fromkeys(found) if config is not None]


def write_json(path: Path, value: dict) -> None:
    """Written beside and renamed: whoever reads finds the whole file, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
