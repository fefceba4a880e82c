"""Two runs on one device: every row and every speed-up that both have, and whether they differ beyond the noise.

It counts where the p10-p90 ranges do not overlap, from four rounds on. Speed-ups, ratios within a round, do not feel a
machine that was busier in one run: they are the stricter comparison.
"""

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..command import table
from ..prefill.table import label, place, same_mode
from ..results import ResultError, read
from ..stats import ENOUGH_ROUNDS, low_high


class Measured(NamedTuple):
    """A median with its p10 and p90; `lower_is_better` of times, not of speed-ups."""

    value: float
    low: float
    high: float
    rounds: int
    lower_is_better: bool


def compare(first: Path, second: Path) -> str:
    a, b = read(first), read(second)
    if a["kind"] != b["kind"] or a["kind"] not in ("prefill", "kernels"):
        raise ResultError(f"--compare: expected two prefill or two kernels files, got {a['kind']!r} and {b['kind']!r}")
    for field in ("device", "dtype", "preset", "sizes"):
        if a.get(field) != b.get(field):
            raise ResultError(
                f"--compare: {field}: {a.get(field)!r} in {first}, {b.get(field)!r} in {second}; "
                "a ratio of the two would say nothing about the code"
            )
    before, after = measured(a), measured(b)
    lines = [[*key, *difference(before[key], after[key])] for key in before if key in after]
    if not lines:
        raise ResultError(f"--compare: {first} and {second} have no measured row in common")
    title = f"A {first} ({a['commit'][:12]})   B {second} ({b['commit'][:12]})   {a['device']}"
    header = ("what", "of", "at", "A [p10, p90]", "B [p10, p90]", "B / A", "")
    return "\n".join([title, "", table(header, lines, left=3)])


def measured(result: dict[str, Any]) -> dict[tuple[str, str, str], Measured]:
    """(what, of, at) -> times of rows, and speed-ups."""
    found, rounds = {}, {}
    for row in result["rows"]:
        if result["kind"] == "prefill":
            key, samples = (label(row), f"{row['mode']}, {place(row)}"), row["samples"]["total_ms"]
            what = ("ms", *key)
        else:
            key, samples = (row["stage"], f"{row['pass']}, batch {row['batch']}, {row['dtype']}"), row["samples"]
            what = (f"us of {row['provider']}", *key)
        rounds[key] = len(samples)
        if samples:
            found[what] = Measured(median(samples), *low_high(samples), len(samples), True)
    for (name, where, mode), c in same_mode(result.get("comparisons", [])).items():
        key = name, f"{mode}, {where}"
        if key in rounds:
            found[("speed-up", *key)] = Measured(c["ratio"], c["low"], c["high"], rounds[key], False)
    return found


def difference(a: Measured, b: Measured) -> list[str]:
    ratio, apart = b.value / a.value, a.high < b.low or b.high < a.low
    verdict = "faster" if (ratio < 1) == a.lower_is_better else "SLOWER"
    enough = min(a.rounds, b.rounds) >= ENOUGH_ROUNDS
    shown = [f"{m.value:,.2f} [{m.low:,.2f}, {m.high:,.2f}]" for m in (a, b)]
    return [*shown, f"{ratio:.3f}", "too few rounds" if not enough else verdict if apart else "within noise"]
