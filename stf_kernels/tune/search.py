"""The offline search: which configuration is fastest for a problem on the GPU at hand, or whether plain torch is.

candidates.py says what is worth measuring, measure.py measures. Every measurement goes to a journal at once, so
that an interrupted search goes on where it stopped; the table is written anew with every entry.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..configs import GemmConfig
from ..configs.tables import TABLE_VERSION, parse_table
from .problems import Problem

TORCH_MARGIN = 0.98  # plain torch must be this much faster than the best kernel to be named


@dataclass(frozen=True)
class Key:
    """What an entry of the table is for."""

    problem: str
    dtype: str
    m: int


class Journal:
    """Measurements as they come, one JSON line each: {"problem", "dtype", "m", "config" or null, "us" or null}."""

    def __init__(self, path: Path, header: dict) -> None:
        """header: device and versions; a journal of another header is not mixed with this one."""
        self._path, self._seen = path, {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        if lines and _json(lines[0]) != header:
            raise ValueError(
                f"--journal: {path} is of {lines[0]:.300}, this search is of {json.dumps(header)}; name another"
            )
        for row in map(_json, lines[1:]):
            try:
                index = self._index(Key(row["problem"], row["dtype"], row["m"]), row["config"])
                self._seen[index] = row["us"]
            except (TypeError, KeyError, AttributeError):
                continue  # the line that an interruption cut short, or what else is no measurement
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    @staticmethod
    def _index(key: Key, config: dict | None) -> tuple:
        return key, None if config is None else tuple(sorted(config.items()))

    def knows(self, key: Key, config: GemmConfig | None) -> bool:
        return self._index(key, None if config is None else config.to_dict()) in self._seen

    def time(self, key: Key, config: GemmConfig | None, measure: Callable[[], float | None]) -> float | None:
        """Microseconds as noted, or measured now and noted; None is a configuration that does not run."""
        values = None if config is None else config.to_dict()
        index = self._index(key, values)
        if index not in self._seen:
            us = measure()
            row = {"problem": key.problem, "dtype": key.dtype, "m": key.m, "config": values, "us": us}
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(row))
            self._seen[index] = us
        return self._seen[index]


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def entry_for(
    problem: Problem, key: Key, configs: list[GemmConfig], measure: Callable[[GemmConfig | None], float | None],
    journal: Journal,
) -> dict:  # fmt: skip
    """Measure plain torch and every configuration -> the table's entry, with the measurement that justifies it."""
    rival = journal.time(key, None, lambda: measure(None))
    times = {config: journal.time(key, config, lambda c=config: measure(c)) for config in configs}
    runs = {config: us for config, us in times.items() if us is not None}
    if not runs:
        raise RuntimeError(f"{key}: none of {len(configs)} configurations runs on this device")
    best = min(runs, key=runs.__getitem__)
    kernel_wins = runs[best] * TORCH_MARGIN <= rival
    return {
        "stage": problem.kind,
        "dtype": key.dtype,
        "n": problem.n,
        "k": problem.k,
        "m_max": key.m,
        "provider": "triton" if kernel_wins else "torch",
        "config": best.to_dict() if kernel_wins else None,
        "us": runs[best] if kernel_wins else rival,
        "rival": "torch" if kernel_wins else "triton",
        "rival_us": rival if kernel_wins else runs[best],
    }


def entries_of(path: Path, header: dict) -> list[dict]:
    """The entries of the table that is there, if it was measured by the same versions; another one is begun anew."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        parse_table(text, header["arch"])
    except (ValueError, TypeError, KeyError) as error:
        print(f"{path} is not a table of this device and will be replaced: {error}", flush=True)
        return []
    table = json.loads(text)
    if table == {"version": TABLE_VERSION, **header, "entries": table["entries"]}:
        return table["entries"]
    print(f"{path} was measured with other versions; its {len(table['entries'])} entries will be replaced", flush=True)
    return []


def with_entry(entries: list[dict], entry: dict) -> list[dict]:
    """`entries` with what they say of the same problem replaced."""
    place = ("stage", "dtype", "n", "k", "m_max")
    return [other for other in entries if any(other[name] != entry[name] for name in place)] + [entry]


def write_table(path: Path, header: dict, entries: list[dict]) -> None:
    """The table, written beside and renamed."""
    table = {"version": TABLE_VERSION, **header, "entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.partial")
    beside.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
