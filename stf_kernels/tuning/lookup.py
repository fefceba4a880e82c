"""From a problem to a configuration: the device's table if it knows the stage, else the heuristic.

A table is tables/<device-slug>.json:

    {"version": 1, "device": "NVIDIA H200", "arch": "sm_90", "commit": ..., "torch": ..., "triton": ...,
     "entries": [{"stage": "concat", "dtype": "bfloat16", "n": 4096, "k": 8192, "m_max": 1152,
                  "provider": "triton", "config": {...}, "us": ..., "rival": ..., "rival_us": ...}, ...]}

An entry serves every M up to m_max that no smaller entry serves; the largest one serves all beyond, unless it is for
few rows by its nature (K split, operands swapped). `provider` is "triton", or "cublas" where the measurement said that
plain torch is faster. `us`, `rival` and `rival_us` are the measurement that justifies the entry: cold-cache
microseconds of it and of the best rival.

A table may also name ways to launch, see launches.py. Where a device has no table, one line in the log says
so, once, and how to measure one.
"""

import functools
import json
import logging
import re
import warnings
from pathlib import Path

import torch

from .config import GemmConfig
from .heuristic import (
    SHARED_MEMORY_LIMIT,
    default_config,
    default_wgrad_config,
    has_descriptor_forms,
    smallest,
)
from .launches import check_launches

_log = logging.getLogger(__name__)
TABLE_VERSION = 1
WGRAD_STAGES = ("concat_wgrad", "merge_wgrad")
STAGES = ("concat", "merge", "linear", "linear_merge", *WGRAD_STAGES)
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
_TABLES = Path(__file__).with_name("tables")
_TOP = {"version", "device", "arch", "commit", "torch", "triton", "entries"}
_ENTRY = {"stage", "dtype", "n", "k", "m_max", "provider", "config", "us", "rival", "rival_us"}

# (slug, itemsize, of a weight gradient, configuration) that did not run in this process: the two kernels share tiles.
_too_large: set[tuple[str, int, bool, GemmConfig | None]] = set()
INTERPRETER_CONFIG = GemmConfig(block_m=32, block_n=32, block_k=32, group_m=2)

# (stage, dtype, n, k) -> (m_max, configuration) in ascending order; None is cuBLAS.
Table = dict[tuple[str, str, int, int], list[tuple[int, GemmConfig | None]]]


def device_slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200": the name of a device's table and of its folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_path(slug: str) -> Path:
    return _TABLES / f"{slug}.json"


def parse_table(text: str, arch: str) -> Table:
    """Entries by (stage, dtype, n, k), sorted by m_max.  ValueError names what is unknown, wrong or cannot run."""
    table = json.loads(text)
    if not isinstance(table, dict):
        raise ValueError(f"table: expected an object, got {type(table).__name__}")
    if table.get("version") != TABLE_VERSION:
        raise ValueError(f"version: expected {TABLE_VERSION}, got {table.get('version')!r}")
    _check_fields("table", {name: value for name, value in table.items() if name != "launches"}, _TOP)
    if table["arch"] != arch:
        raise ValueError(f"arch: the table is for {table['arch']!r}, this device is {arch!r}")
    check_launches(table.get("launches", {}), arch)
    parsed: Table = {}
    for number, entry in enumerate(table["entries"]):
        where = f"entries[{number}]"
        _check_fields(where, entry, _ENTRY)
        if entry["stage"] not in STAGES:
            raise ValueError(f"{where}.stage: expected one of {list(STAGES)}, got {entry['stage']!r}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{where}.dtype: expected one of {list(DTYPES)}, got {entry['dtype']!r}")
        for name in ("n", "k", "m_max"):
            if type(entry[name]) is not int or entry[name] < 1:
                raise ValueError(f"{where}.{name}: expected a positive int, got {entry[name]!r}")
        key = (entry["stage"], entry["dtype"], entry["n"], entry["k"])
        parsed.setdefault(key, []).append((entry["m_max"], _config(where, entry, arch)))
    for choices in parsed.values():
        choices.sort(key=lambda pair: pair[0])
    return parsed


def _check_fields(where: str, found: dict, expected: set[str]) -> None:
    if unknown := sorted(set(found) - expected):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}, expected {sorted(expected)}")
    if missing := sorted(expected - set(found)):
        raise ValueError(f"{where}: field {missing[0]!r} is missing")


def _config(where: str, entry: dict, arch: str) -> GemmConfig | None:
    if entry["provider"] == "cublas":
        return None
    if entry["provider"] != "triton":
        raise ValueError(f"{where}.provider: expected 'triton' or 'cublas', got {entry['provider']!r}")
    config = GemmConfig.from_dict(entry["config"])
    threads = config.num_warps * (64 if arch.startswith("gfx") else 32)
    if threads > 1024:
        raise ValueError(f"{where}.config: num_warps: {config} has {threads} threads, a program has at most 1024")
    registers = 512 if arch.startswith("gfx") else 255
    tensor_memory = arch.startswith("sm_10")  # there it is not registers that hold the tile
    if config.rows * config.block_n > registers * threads and not tensor_memory:
        raise ValueError(f"{where}.config: the tile of {config} takes more than {registers} registers a thread")
    if config.split_k > 1 and arch.startswith("gfx"):
        raise ValueError(f"{where}.config: split_k is for NVIDIA GPUs, got {config} for {arch}")
    if config.form != "pointers" and not has_descriptor_forms(arch, DTYPES[entry["dtype"]]):
        raise ValueError(
            f"{where}.config: form {config.form!r} is for 16 bit on Hopper and later, got {config} for {arch}"
        )
    gathers, several = entry["stage"] == "merge", entry["stage"] == "concat"
    wgrad = entry["stage"] in WGRAD_STAGES
    if (config.form != "pointers" and (gathers or wgrad)) or (config.form == "swapped" and several):
        raise ValueError(f"{where}.config: stage {entry['stage']!r} has no form {config.form!r}, got {config}")
    if wgrad and config.split_k > 1:
        raise ValueError(f"{where}.config: stage {entry['stage']!r} does not split K, got {config}")
    need, limit = config.shared_bytes(DTYPES[entry["dtype"]]), SHARED_MEMORY_LIMIT.get(arch)
    if limit is not None and need > limit:
        raise ValueError(f"{where}.config: {config} needs {need} bytes of shared memory, {arch} has {limit}")
    return config


def gpu_index(device: torch.device) -> int:
    """Of a GPU; "cuda" without an index is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def device_identity(index: int) -> tuple[str, str]:
    """(slug, architecture) of a GPU: ("nvidia-h200", "sm_90")."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return device_slug(properties.name), properties.gcnArchName.split(":")[0]
    return device_slug(properties.name), f"sm_{properties.major}{properties.minor}"


@functools.cache
def _table(slug: str, arch: str) -> Table:
    path = table_path(slug)
    if not path.exists():
        _log.warning(
            "no table for %s (%s): a heuristic serves; `python -m stf_kernels.tuning` measures one", slug, arch
        )
        return {}
    try:
        return parse_table(path.read_text(encoding="utf-8"), arch)
    except (ValueError, TypeError, KeyError, OSError) as error:
        warnings.warn(f"stf_kernels: {path.name} is not used, the heuristic serves instead. {error}", stacklevel=2)
        return {}


@functools.lru_cache(maxsize=4096)
def _choose(slug: str, arch: str, stage: str, dtype: torch.dtype, m: int, n: int, k: int) -> GemmConfig | None:
    choices = _table(slug, arch).get((stage, str(dtype).removeprefix("torch."), n, k))
    for m_max, config in choices or ():
        if m <= m_max:
            return config
    # Beyond the table: split K's workspace would grow with M, gigabytes for what a table of one image says.
    if choices and not (choices[-1][1] is not None and choices[-1][1].is_for_few_rows):
        return choices[-1][1]
    # Of any stage's weight gradient, also of one that no table can name: a cropped linear layer's.
    return None if stage.endswith("_wgrad") else default_config(arch, dtype.itemsize, m, n)


def choose(
    device: torch.device,
    stage: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    may_decline: bool = True,
    save_pre: bool = False,
) -> GemmConfig | None:
    """The configuration for y [m, n] = A [m, k] @ W^T at a stage of `STAGES` on `device`.

    None where the table says that cuBLAS is faster, unless may_decline=False. On the CPU (the interpreter) it is one
    small configuration: nothing there depends on speed.
    """
    if device.type == "cpu":
        return INTERPRETER_CONFIG
    slug, arch = device_identity(gpu_index(device))
    config = _choose(slug, arch, stage, dtype, m, n, k)
    # Tables are measured without the pre-activation's store, which wants smaller tiles.
    not_to_decline = config is None and not may_decline
    too_large_to_train = config is not None and save_pre
    if not_to_decline or too_large_to_train:
        config = default_config(arch, dtype.itemsize, m, n, save_pre=save_pre)
    return smallest(dtype.itemsize) if (slug, dtype.itemsize, False, config) in _too_large else config


def choose_wgrad(
    device: torch.device, stage: str, dtype: torch.dtype, m: int, n: int, k: int, *, may_decline: bool = True
) -> GemmConfig | None:
    """The segmented kernel's configuration for dW [n, k], a sum over m rows, of a stage that gathers or concatenates.

    None, the library GEMM, where no table names the kernel, unless may_decline=False, and where it did not run.
    """
    if device.type == "cpu":
        return INTERPRETER_CONFIG
    slug, arch = device_identity(gpu_index(device))
    config = _choose(slug, arch, f"{stage}_wgrad", dtype, m, n, k)
    if config is None and not may_decline:
        config = default_wgrad_config(arch, dtype.itemsize, n, k)
    return None if (slug, dtype.itemsize, True, config) in _too_large else config


def reject(
    device: torch.device, dtype: torch.dtype, config: GemmConfig, reason: object, *, wgrad: bool = False
) -> None:
    """Remember that a configuration does not run on a device, and warn, once for each.

    `choose` then gives the smallest one or, if wgrad, `choose_wgrad` the library GEMM.
    """
    slug, arch = device_identity(gpu_index(device))
    rejected = slug, dtype.itemsize, wgrad, config
    if rejected in _too_large:
        return
    _too_large.add(rejected)
    instead = "the library GEMM" if wgrad else smallest(dtype.itemsize)
    warnings.warn(
        f"stf_kernels: {config} does not run on {slug} ({arch}): {reason}. {instead} serves instead; "
        "`python -m stf_kernels.tuning` finds better ones",
        stacklevel=2,
    )


def shipped_configs(arch: str, dtype: str, *, wgrad: bool) -> list[GemmConfig]:
    """Every configuration that a shipped table of an architecture names for a dtype (torch's name): of the weight
    gradients, or of the other stages."""
    found: dict[GemmConfig, None] = {}
    for path in sorted(_TABLES.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        if json.loads(text).get("arch") != arch:
            continue
        for (stage, entry_dtype, _, _), choices in parse_table(text, arch).items():
            if entry_dtype == dtype and (stage in WGRAD_STAGES) == wgrad:
                found.update((config, None) for _, config in choices if config is not None)
    return list(found)
