"""Two runs on one device: every row and every speed-up that both have, and whether they differ beyond the noise.

A difference counts when the p10-p90 ranges of the two runs do not overlap; with fewer than four rounds that happens by
chance too often to be told. Ratios within a round do not feel a machine that was busier in one run: the speed-ups are
the stricter comparison.
"""

from pathlib import Path
from statistics import median
from typing import Any

from ..command import number, table
from ..prefill.speedup import label
from ..results import ResultError, read
from ..stats import ENOUGH_ROUNDS, low_high

PLACE = ("mode", "batch", "text_tokens", "images")
KEYS = {"prefill": ("model", *PLACE), "kernels": ("stage", "pass", "provider", "dtype", "batch")}


def compare(first: Path, second: Path) -> str:
    a, b = read(first), read(second)
    kind = a["kind"]
    if kind != b["kind"] or kind not in KEYS:
        raise ResultError(f"--compare: expected two prefill or two kernels files, got {kind!r} and {b['kind']!r}")
    for field in ("device", "dtype", "preset", "sizes"):
        if a.get(field) != b.get(field):
            raise ResultError(
                f"--compare: {field}: {a.get(field)!r} in {first}, {b.get(field)!r} in {second}; "
                "a ratio of the two would say nothing about the code"
            )
    before, after = _samples(a), _samples(b)
    shared = [key for key in before if after.get(key) and before[key]]
    if not shared:
        raise ResultError(f"--compare: {first} and {second} have no measured row in common")
    lines = [[*map(str, key), *difference(before[key], after[key])] for key in shared]
    unit = "ms" if kind == "prefill" else "us"
    title = f"A {first} ({a['commit'][:12]})   B {second} ({b['commit'][:12]})   {a['device']}"
    out = [title, "", table((*KEYS[kind], f"A {unit}", f"B {unit}", "B / A", ""), lines, left=len(KEYS[kind]))]
    if speedups := _speedups(a, b, before, after):
        header = ("speed-up of", *PLACE, "over", "A", "B", "")
        out += ["", table(header, speedups, left=len(header) - 3)]
    return "\n".join(out)


def _samples(result: dict[str, Any]) -> dict[tuple, list[float]]:
    found = {}
    for row in result["rows"]:
        samples = row["samples"]["total_ms"] if result["kind"] == "prefill" else row["samples"]
        named = {**row, "model": label(row)} if result["kind"] == "prefill" else row
        found[tuple(named[key] for key in KEYS[result["kind"]])] = [value for value in samples if value is not None]
    return found


def _verdict(rounds: int, apart: bool, otherwise: str) -> str:
    return "too few rounds" if rounds < ENOUGH_ROUNDS else otherwise if apart else "within noise"


def difference(before: list[float], after: list[float]) -> tuple[str, str, str, str]:
    (low, high), (later_low, later_high) = low_high(before), low_high(after)
    ratio, apart = median(after) / median(before), high < later_low or later_high < low
    verdict = _verdict(min(len(before), len(after)), apart, "faster" if ratio < 1 else "SLOWER")
    return number(median(before), 2), number(median(after), 2), f"{ratio:.3f}", verdict


def _speedups(a: dict[str, Any], b: dict[str, Any], before: dict, after: dict) -> list[list[str]]:
    def key(c: dict[str, Any]) -> tuple:
        return c["row"], *(c[field] for field in PLACE)

    theirs, lines = {(key(c), c["baseline_mode"]): c for c in b.get("comparisons", ())}, []
    for c in a.get("comparisons", ()):
        if other := theirs.get((key(c), c["baseline_mode"])):
            rounds = min(len(before[key(c)]), len(after[key(c)]))
            verdict = _verdict(rounds, c["high"] < other["low"] or other["high"] < c["low"], "DIFFERS")
            shown = [f"{s['ratio']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in (c, other)]
            lines.append([*map(str, key(c)), c["baseline_mode"], *shown, verdict])
    return lines
