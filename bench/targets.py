"""What the captured 7B prefill is to reach, 64 text tokens; where a run falls short: by how much, and in which stage.

speed-up   captured LLaVA-STF at least 2.5x faster than captured LLaVA-1.5 and 3x than eager, batch 1 and 8
floor      the library's own stages, projector and insertion, within 1.15x of their floors, batch 8
"""

from __future__ import annotations

from typing import Any

from .speedup import BASELINE, label, point, where

SPEEDUP = {"graph": 2.5, "eager": 3.0}  # mode of the baseline -> least
FLOOR = {"projector_ms": 1.15, "insert_ms": 1.15}  # stage -> most
TEXT, SPEEDUP_BATCHES, FLOOR_BATCH = 64, (1, 8), 8


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that the rows of a result say something about; of one point the row with most savings counts."""
    if result["preset"] != "7b" or result["refused"]:
        return []
    captured = [row for row in result["rows"] if row["mode"] == "graph" and row["projector"] == "fused"]
    wanted = [row for row in captured if row["total_ms"] is not None and where(row)[1:] == (TEXT, 1)]
    ours = {row["batch"]: row for row in sorted(wanted, key=lambda row: len(row["savings"]))}
    return [found for row in ours.values() for found in (*_speedups(result, row), *_floors(row))]


def _speedups(result: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for c in result["comparisons"] if row["batch"] in SPEEDUP_BATCHES else ():
        if (c["row"], c["mode"], point(c)) != (label(row), "graph", point(row)) or c["baseline"] != "/".join(BASELINE):
            continue
        least = SPEEDUP[c["baseline_mode"]]
        name = f"{c['row']} captured over LLaVA-1.5 {c['baseline_mode']}, {point(row)}"
        reached = c["ratio"] >= least
        found.append({
            "name": name, "value": c["ratio"], "target": least, "reached": reached,
            "why": None if reached else _furthest(row),
        })  # fmt: skip
    return found


def _floors(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for stage, most in FLOOR.items() if row["batch"] == FLOOR_BATCH else ():
        ratio = row["floor_ratio"][stage]
        if ratio is not None:
            name = f"{label(row)} captured, {stage.removesuffix('_ms')} over its floor, {point(row)}"
            reached = ratio <= most
            why = None if reached else f"{row[stage] - most * row['floor_ms'][stage]:.3f} ms too long"
            found.append({"name": name, "value": ratio, "target": most, "reached": reached, "why": why})
    return found


def _furthest(row: dict[str, Any]) -> str | None:
    """The stage that lost most against its floor."""
    above = {
        stage: row[stage] - floor
        for stage, floor in row["floor_ms"].items() if stage != "total_ms" and row[stage] is not None
    }  # fmt: skip
    if not above:
        return None
    stage = max(above, key=above.__getitem__)
    return f"most is lost in {stage.removesuffix('_ms')}, {above[stage]:.2f} ms above its floor"


def sentence(target: dict[str, Any]) -> str:
    """As the terminal and the page say it."""
    value, wanted = target["value"], target["target"]
    short = "reached" if target["reached"] else f"missed by {abs(value - wanted) / wanted:.1%}"
    return f"{target['name']}: {value:.2f}x, target {wanted:g}x, {short}" + (
        f" ({target['why']})" * bool(target["why"])
    )
