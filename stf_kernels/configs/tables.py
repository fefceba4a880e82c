"""What was measured on a device: its shipped table, and the user's cache of what was selected at first use.

    tables/nvidia-h200.json      beside this file, written by `python -m stf_kernels.tune`
    $STF_KERNELS_CACHE, else $XDG_CACHE_HOME/stf_kernels, else ~/.cache/stf_kernels
        nvidia-h200-torch2.13.0-triton3.7.1-stf_kernels0.2.0.json

    {"version": 4, "device": "nvidia-h200", "arch": "sm_90", "made_with": {"torch": ..., "triton": ..., ...},
     "entries": [{"stage": "concat", "dtype": "bfloat16", "n": 4096, "k": 8192, "m_max": 1536, "save_pre": false,
                  "tf32": false, "config": {...}, or null for plain torch,
                  "candidates": [{"config": {...} or null, "us": ...}, ...]}, ...],
     "failed": [{"itemsize": 2, "config": {...}, "reason": ...}, ...]}

An entry's config is what serves, for rows of A up to m_max and beyond the next smaller of 1, 2, 3, 4, 6, 8, 12, ...;
candidates are the microseconds that decided it. A file may be edited; one that is not right is not used.
"""

import contextlib
import functools
import importlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import GemmConfig, check_fields
from .model import does_not_suit

VERSION = 4  # 3 had weight gradients
STAGES = ("concat", "merge", "linear", "linear_merge")
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
KEY = ("stage", "dtype", "n", "k", "m_max", "save_pre", "tf32")
_FOLDER = Path(__file__).with_name("tables")
_LOCK_SECONDS = 5.0

# itemsize, configuration: kernels share tiles, and what is wrong at one product is not trusted.
Failed = tuple[int, GemmConfig]


class Known(NamedTuple):
    """What serves a product, None for plain torch, and the microseconds of all that was measured."""

    config: GemmConfig | None
    us: dict[GemmConfig | None, float]

    @property
    def kernel(self) -> GemmConfig | None:
        """What serves where plain torch is not to."""
        return self.config or min(filter(None, self.us), key=self.us.__getitem__, default=None)


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


def folder() -> Path:
    """Of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("STF_KERNELS_CACHE") or os.path.join(home, "stf_kernels"))


def table_path(slug: str) -> Path:
    return _FOLDER / f"{slug}.json"


def versions() -> dict[str, str]:
    """What a measurement depends on beside the device."""
    import triton

    library = importlib.import_module(__package__.partition(".")[0])
    return {"torch": torch.__version__, "triton": triton.__version__, "stf_kernels": library.__version__}


@functools.cache
def table_of(slug: str, arch: str) -> "Table":
    """The shipped one of a device; empty where it has none."""
    return Table(table_path(slug), slug, arch).read()


@functools.cache
def cache_of(slug: str, arch: str) -> "Table":
    """The user's of a device, as its file was at the first call of this process."""
    name = "-".join([slug, *map("".join, versions().items())])
    return Table(folder() / f"{name}.json", slug, arch, versions()).read()


class Table:
    """known: entries by the key of their problem (KEY); failed: what is not tried again, with the reason."""

    def __init__(self, path: Path, slug: str, arch: str, made_with: dict[str, str] | None = None) -> None:
        """made_with: the versions that the file must have been written with; None takes any."""
        self.path, self.slug, self.arch, self.made_with = path, slug, arch, made_with
        self.known: dict[tuple, Known] = {}
        self.failed: dict[Failed, str] = {}
        self._warned = False

    def read(self) -> "Table":
        """What the file says, below what this process found itself."""
        try:
            known, failed = self.parse(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self
        except Exception as error:  # whatever nonsense it holds must not end a user's call
            self.warn(f"is not used: {error}")
            return self
        self.known, self.failed = known | self.known, failed | self.failed
        return self

    def write(self) -> None:
        """What this process found, into what the file says by now. OSError where it cannot be written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            self.read()
            entries = [
                dict(zip(KEY, key, strict=True))
                | {
                    "config": config and config.to_dict(),
                    "candidates": [{"config": tried and tried.to_dict(), "us": time} for tried, time in us.items()],
                }
                for key, (config, us) in self.known.items()
            ]
            failed = [
                {"itemsize": itemsize, "config": config.to_dict(), "reason": reason}
                for (itemsize, config), reason in self.failed.items()
            ]
            write_json(self.path, self._header() | {"entries": entries, "failed": failed})

    def parse(self, text: str) -> tuple[dict[tuple, Known], dict[Failed, str]]:
        """(known, failed) of a file. ValueError names what is unknown, wrong or cannot run."""
        value, header, known, failed = json.loads(text), self._header(), {}, {}
        check_fields("table", value, {*header, "entries", "failed"})
        for name, expected in header.items():
            if expected is not None and value[name] != expected:
                raise ValueError(f"{name}: expected {expected!r}, got {value[name]!r}")
        for number, entry in enumerate(value["entries"]):
            where = f"entries[{number}]"
            check_fields(where, entry, {*KEY, "config", "candidates"})
            for name, allowed in (("stage", STAGES), ("dtype", DTYPES)):
                if entry[name] not in allowed:
                    raise ValueError(f"{where}.{name}: expected one of {list(allowed)}, got {entry[name]!r}")
            config, us = _config(entry), {}
            if config and (reason := does_not_suit(config, self.arch, entry["stage"], DTYPES[entry["dtype"]])):
                raise ValueError(f"{where}.config: {reason}")
            for candidate in entry["candidates"]:
                check_fields(f"{where}.candidates", candidate, {"config", "us"})
                us[_config(candidate)] = float(candidate["us"])
            known[tuple(entry[name] for name in KEY)] = Known(config, us)
        for number, record in enumerate(value["failed"]):
            check_fields(f"failed[{number}]", record, {"itemsize", "config", "reason"})
            failed[record["itemsize"], _config(record)] = record["reason"]
        return known, failed

    def warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"stf_kernels: {self.path} {what}", stacklevel=2)

    def _header(self) -> dict[str, Any]:
        return {"version": VERSION, "device": self.slug, "arch": self.arch, "made_with": self.made_with}


def _config(record: dict) -> GemmConfig | None:
    return None if record["config"] is None else GemmConfig.from_dict(record["config"])


def shipped_configs(arch: str, dtype: str) -> list[GemmConfig]:
    """Every configuration that a shipped table of an architecture names for a dtype."""
    found: dict[GemmConfig, None] = {}
    for path in sorted(_FOLDER.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        if json.loads(text)["arch"] == arch:
            known, _ = Table(path, path.stem, arch).parse(text)
            for (_, entry_dtype, *_), (config, _) in known.items():
                if config and entry_dtype == dtype:
                    found[config] = None
    return list(found)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """OSError where another process holds the lock for long, or the file system has none."""
    import fcntl

    with open(path, "w") as file:
        until = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.02)
        yield


def write_json(path: Path, value: dict) -> None:
    """Written beside and renamed: whoever reads finds the whole file, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
