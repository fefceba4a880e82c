"""Which configuration is fastest for a problem on the GPU at hand, or whether plain torch is.

The table is written anew with every entry, so that an interrupted search goes on where it stopped.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from ..configs import GemmConfig
from ..configs.tables import TABLE_VERSION, parse_table
from .problems import Problem

# Microseconds of a configuration, or of plain torch for None; None of one that does not run.
Measure = Callable[[GemmConfig | None], float | None]
TORCH_MARGIN = 0.98  # plain torch must be this much faster than the best kernel to be named


def entry_for(problem: Problem, dtype: str, m: int, configs: list[GemmConfig], measure: Measure) -> dict:
    """Measure plain torch and every configuration -> the table's entry, with the measurement that justifies it."""
    rival = measure(None)
    runs = {config: us for config in configs if (us := measure(config)) is not None}
    if not runs:
        raise RuntimeError(f"{problem.name}, {dtype}, m {m}: none of {len(configs)} configurations runs on this device")
    best = min(runs, key=runs.__getitem__)
    kernel_wins = runs[best] * TORCH_MARGIN <= rival
    return {
        "stage": problem.kind,
        "dtype": dtype,
        "n": problem.n,
        "k": problem.k,
        "m_max": m,
        "provider": "triton" if kernel_wins else "torch",
        "config": best.to_dict() if kernel_wins else None,
        "us": runs[best] if kernel_wins else rival,
        "rival": "torch" if kernel_wins else "triton",
        "rival_us": rival if kernel_wins else runs[best],
    }


class TableFile:
    """A table on disk, entry by entry."""

    def __init__(self, path: Path, header: dict) -> None:
        """header: device and versions; the entries of a table of another header are not mixed with this one's."""
        self._path, self._header, self.entries = path, header, []
        if not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
            parse_table(text, header["arch"])
        except (ValueError, TypeError, KeyError) as error:
            print(f"{path} is not a table of this device and will be replaced: {error}", flush=True)
            return
        table = json.loads(text)
        entries = table.pop("entries")
        if table == {"version": TABLE_VERSION, **header}:
            self.entries = entries
        else:
            print(f"{path} was measured with other versions; its {len(entries)} entries will be replaced", flush=True)

    @staticmethod
    def _place(entry: dict) -> tuple:
        return tuple(entry[name] for name in ("stage", "dtype", "n", "k", "m_max"))

    def knows(self, problem: Problem, dtype: str, m: int) -> bool:
        return (problem.kind, dtype, problem.n, problem.k, m) in map(self._place, self.entries)

    def add(self, entry: dict) -> None:
        """In place of what the table says of the same problem."""
        self.entries = [other for other in self.entries if self._place(other) != self._place(entry)] + [entry]
        write_json(self._path, {"version": TABLE_VERSION, **self._header, "entries": self.entries})


def write_json(path: Path, value: dict) -> None:
    """Written beside and renamed: whoever reads finds the whole file, old or new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
