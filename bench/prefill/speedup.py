"""From rows to speed-ups over the stock model, and the refusal to report any when outputs that should agree do not."""

from statistics import median
from typing import Any

from ..stats import ENOUGH_ROUNDS, paired_ratio
from .presets import FAMILIES, Point

BASELINES = {f"{family}/mlp2x" for family in FAMILIES}


def label(row: dict[str, Any]) -> str:
    return f"{row['model']}/{row['projector']}"


def place(row: dict[str, Any]) -> Point:
    """Of a row or a comparison: what must be equal for two to be compared."""
    return Point(row["batch"], row["text_tokens"], row["images"])


def compare_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row against LLaVA-1.5 of its batch, text length and mode; captured rows also against eager LLaVA-1.5."""
    measured = [row for row in rows if row["total_ms"] is not None]
    baselines = {(place(row), row["mode"]): row for row in measured if label(row) in BASELINES}
    pairs = ((row, baselines.get((place(row), mode))) for row in measured for mode in {row["mode"]: 0, "eager": 0})
    return [_comparison(row, baseline) for row, baseline in pairs if baseline is not None and baseline is not row]


def _comparison(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = row["samples"]["total_ms"], baseline["samples"]["total_ms"]
    count = min(len(ours), len(theirs))
    if row["mode"] == baseline["mode"]:
        ratio = paired_ratio(theirs[:count], ours[:count])
    else:  # not taken side by side: the ratio of medians, and its extremes
        ratio = {"ratio": median(theirs) / median(ours)}
        ratio |= {"low": min(theirs) / max(ours), "high": max(theirs) / min(ours)}
    beyond = None if count < ENOUGH_ROUNDS else ratio["low"] > 1 or ratio["high"] < 1
    names = {"row": label(row), "baseline": label(baseline), **place(row)._asdict()}
    modes = {"mode": row["mode"], "baseline_mode": baseline["mode"]}
    return {**names, **modes, **ratio, "beyond_noise": beyond}


def same_mode(comparisons: list[dict[str, Any]]) -> dict[tuple[str, Point, str], dict[str, Any]]:
    """(row, place, mode) -> its speed-up over LLaVA-1.5 in the same mode."""
    return {(c["row"], place(c), c["mode"]): c for c in comparisons if c["mode"] == c["baseline_mode"]}


def doubt(comparison: dict[str, Any]) -> str | None:
    """Why a speed-up may be nothing but noise; None where it is more."""
    if comparison["beyond_noise"] is None:
        return f"fewer than {ENOUGH_ROUNDS} rounds cannot tell it from noise (--rounds {ENOUGH_ROUNDS} or more can)"
    return None if comparison["beyond_noise"] else "within its rounds' noise"


def speedup_field(comparisons: list[dict[str, Any]]) -> dict[str, float]:
    """The `speedup` of prefill.json: a sentence -> a number."""
    said = "{row} {mode} over {baseline} {baseline_mode}"
    return {f"{said.format(**c)}, {place(c)}": c["ratio"] for c in comparisons}


def refusal(checks: list[dict[str, Any]]) -> str | None:
    """Why no speed-up is reported, or None when everything that should agree does."""
    broken = [check["name"] for check in checks if not check["agrees"]]
    return None if not broken else "outputs that should agree differ by more than rounding: " + "; ".join(broken)
