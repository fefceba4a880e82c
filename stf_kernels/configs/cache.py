"""What was selected on this device at first use: a file of the user's, one a device and set of versions.

    $STF_KERNELS_CACHE, else $XDG_CACHE_HOME/stf_kernels, else ~/.cache/stf_kernels
        nvidia-h200-torch2.13.0-triton3.7.1-stf_kernels0.2.0.json

    {"version": 1, "device": "nvidia-h200", "arch": "sm_90", "torch": ..., "triton": ..., "stf_kernels": ...,
     "entries": [{what an entry of a table has (tables.py), "m": ..., "save_pre": false, "tf32": false,
                  "candidates": [{"config": {...}, or null for plain torch, "us": ...}, ...]}, ...],
     "failed": [{"stage", "dtype", "config", "reason"}, ...]}

Readable, and may be deleted or edited: an entry's provider and config are what serves. Processes share it: each writes
what it found into what the file then says, under a lock, beside it, and renames. A file that is not one of these is
replaced, and where none can be written the selections serve their process alone: one warning says so.
"""

import contextlib
import functools
import importlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import GemmConfig, check_fields
from .tables import DTYPES, ENTRY, check_entry, write_json

CACHE_VERSION = 1
_LOCK_SECONDS = 5.0
_MORE = {"m", "save_pre", "tf32", "candidates"}
KEY = ("stage", "dtype", "n", "k", "m_max", "save_pre", "tf32")

# itemsize, of a weight gradient, configuration: kernels share tiles, and what is wrong at one product is not trusted.
Failed = tuple[int, bool, GemmConfig]


class Known(NamedTuple):
    record: dict
    config: GemmConfig | None  # what serves; None: plain torch
    us: dict[GemmConfig | None, float]

    @property
    def kernel(self) -> GemmConfig | None:
        """What serves where plain torch is not to."""
        kernels = {config: us for config, us in self.us.items() if config is not None}
        return self.config or min(kernels, key=kernels.__getitem__, default=None)


def folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("STF_KERNELS_CACHE") or os.path.join(home, "stf_kernels"))


@functools.cache
def cache_of(slug: str, arch: str) -> "Cache":
    """A device's, as its file was at the first call of this process."""
    cache = Cache(slug, arch)
    cache.read()
    return cache


class Cache:
    """known: entries by the key of their problem (KEY); failed: what is not tried again."""

    def __init__(self, slug: str, arch: str) -> None:
        import triton

        library = importlib.import_module(__package__.partition(".")[0])
        versions = {"torch": torch.__version__, "triton": triton.__version__, "stf_kernels": library.__version__}
        self._header = {"version": CACHE_VERSION, "device": slug, "arch": arch, **versions}
        self.slug, self.path = slug, folder() / ("-".join([slug, *map("".join, versions.items())]) + ".json")
        self.known: dict[tuple, Known] = {}
        self.failed: dict[Failed, dict] = {}
        self._warned = False

    def read(self) -> None:
        """What the file says, below what this process found itself."""
        try:
            known, failed = self._parse(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        except Exception as error:  # whatever nonsense it holds must not end a user's call
            self._warn(f"is not used, and is replaced where that is possible: {error}")
            return
        self.known, self.failed = known | self.known, failed | self.failed

    def add(self, entries: list[dict], failed: list[dict]) -> None:
        """For this process, and into the file."""
        found = self._parse(self._header | {"entries": entries, "failed": failed})
        self.known, self.failed = self.known | found[0], self.failed | found[1]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self.read()
                entries = [known.record for known in self.known.values()]
                write_json(self.path, self._header | {"entries": entries, "failed": [*self.failed.values()]})
        except (OSError, ImportError) as error:  # no fcntl on Windows
            self._warn(f"cannot be written, so what is selected serves this process alone: {error}")

    def _parse(self, value: Any) -> tuple[dict[tuple, Known], dict[Failed, dict]]:
        """ValueError names what is unknown, wrong or cannot run."""
        if not isinstance(value, dict):
            raise ValueError(f"cache: expected an object, got {type(value).__name__}")
        check_fields("cache", value, {*self._header, "entries", "failed"})
        for name, expected in self._header.items():
            if value[name] != expected:
                raise ValueError(f"{name}: expected {expected!r}, got {value[name]!r}")
        known, failed = {}, {}
        for number, entry in enumerate(value["entries"]):
            where, us = f"entries[{number}]", {}
            config = check_entry(where, entry, self._header["arch"], ENTRY | _MORE)
            for candidate in entry["candidates"]:
                check_fields(f"{where}.candidates", candidate, {"config", "us"})
                us[candidate["config"] and GemmConfig.from_dict(candidate["config"])] = float(candidate["us"])
            known[tuple(entry[name] for name in KEY)] = Known(entry, config, us)
        for number, record in enumerate(value["failed"]):
            check_fields(f"failed[{number}]", record, {"stage", "dtype", "config", "reason"})
            wgrad = record["stage"].endswith("_wgrad")
            failed[DTYPES[record["dtype"]], wgrad, GemmConfig.from_dict(record["config"])] = record
        return known, failed

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"stf_kernels: the cache of selections {self.path} {what}", stacklevel=2)


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
