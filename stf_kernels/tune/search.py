"""Which configuration is fastest for a problem on the GPU at hand, or whether plain torch is.

The table is written anew with every entry, so that an interrupted search goes on where it stopped.
"""

import json
from pathlib import Path

from ..configs import GemmConfig
from ..configs.selection import entry_of
from ..configs.tables import TABLE_VERSION, parse_table, write_json
from .problems import Problem


def entry_for(problem: Problem, dtype: str, m: int, us: dict[GemmConfig | None, float]) -> dict:
    """The table's entry from the microseconds of plain torch (None) and of every configuration that is right."""
    if set(us) == {None}:
        raise RuntimeError(f"{problem.name}, {dtype}, m {m}: no configuration runs on this device")
    return entry_of({"stage": problem.kind, "dtype": dtype, "n": problem.n, "k": problem.k, "m_max": m}, us)


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
