"""The same row in several runs: one line per row, mode and size, a column per file. No ratio is taken across files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .speedup import label, where
from .table import number

Cell = tuple[float, float | None]  # milliseconds to the first token, speed-up over LLaVA-1.5 in its own file


def lines(results: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(header, rows) of what at least two of the prefill files measured; no rows where there is nothing."""
    files = [(name, result) for name, result in results if result["kind"] == "prefill"]
    measured = [_totals(result) for _, result in files]
    keys = list(dict.fromkeys(key for totals in measured for key in totals))
    shared = [key for key in keys if sum(key in totals for totals in measured) > 1]
    header = ["model", "mode", "batch", "text", "images", *(f"{name}: {_what(result)}" for name, result in files)]
    return header, [(*map(str, key), *(_shown(totals.get(key)) for totals in measured)) for key in shared]


def _what(result: dict[str, Any]) -> str:
    return f"{result.get('preset', '')} on {result['device']}, {result['dtype']}"


def _totals(result: dict[str, Any]) -> dict[tuple, Cell]:
    ratios = {
        (c["row"], c["mode"], *where(c)): c["ratio"]
        for c in result["comparisons"] if c["mode"] == c["baseline_mode"]
    }  # fmt: skip
    totals = {}
    for row in result["rows"]:
        if row["total_ms"] is None:
            continue
        # Files from before rows named their savings: both LLaVA-STF rows had all of them.
        unnamed = "+savings" if row["model"] == "llava-stf" and "savings" not in row else ""
        place = (row["mode"], *where(row))
        totals[(label(row) + unnamed, *place)] = row["total_ms"], ratios.get((label(row), *place))
    return totals


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    total, ratio = cell
    return number(total, 2) + (f" ({ratio:.2f}x)" if ratio else "")
