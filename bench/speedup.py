"""From rows to speed-ups, and the refusal to report any when outputs that should agree do not.

speed-up = median over rounds of  total(baseline, round i) / total(row, round i)
"""

from __future__ import annotations

from typing import Any

from .stats import ENOUGH_ROUNDS, median, paired_ratio

BASELINE = ("llava-1.5", "mlp2x")


def label(row: dict[str, Any]) -> str:
    """The name of a row; LLaVA-STF with more saved than its projector (plain.py) is a row of its own."""
    more = "+savings" if row["model"] == "llava-stf" and row.get("savings") else ""
    return f"{row['model']}/{row['projector']}{more}"


def names_savings(result: dict[str, Any]) -> bool:
    """False for files from before rows did: both of their LLaVA-STF rows had every saving."""
    return all("savings" in row for row in result["rows"])


def where(row: dict[str, Any]) -> tuple[int, int, int]:
    """Batch, text length and images of a row or a comparison: what must be equal for two to be compared."""
    return row["batch"], row["text_tokens"], row.get("images", 1)


def point(row: dict[str, Any]) -> str:
    batch, text, images = where(row)
    return f"batch {batch}, text {text}" + (f", {images} images" if images > 1 else "")


def compare_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row against LLaVA-1.5 of its batch, text length and mode; captured rows also against eager LLaVA-1.5."""
    measured = [row for row in rows if row["total_ms"] is not None]
    baselines = {(*where(row), row["mode"]): row for row in measured if (row["model"], row["projector"]) == BASELINE}
    result = []
    for row in measured:
        for mode in dict.fromkeys((row["mode"], "eager")):
            baseline = baselines.get((*where(row), mode))
            if baseline is not None and baseline is not row:
                result.append(_comparison(row, baseline))
    return result


def _comparison(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = row["samples"]["total_ms"], baseline["samples"]["total_ms"]
    if row["mode"] == baseline["mode"]:
        count = min(len(ours), len(theirs))
        ratio = paired_ratio(theirs[:count], ours[:count])
    else:  # not taken side by side: the ratio of medians, and its extremes
        ratio = {
            "ratio": median(theirs) / median(ours), "low": min(theirs) / max(ours), "high": max(theirs) / min(ours),
        }  # fmt: skip
    return {
        "row": label(row), "baseline": label(baseline), "batch": row["batch"], "text_tokens": row["text_tokens"],
        "images": row.get("images", 1), "mode": row["mode"], "baseline_mode": baseline["mode"], **ratio,
        "beyond_noise": None if min(len(ours), len(theirs)) < ENOUGH_ROUNDS else ratio["low"] > 1 or ratio["high"] < 1,
    }  # fmt: skip


def doubt(comparison: dict[str, Any]) -> str | None:
    """Why a speed-up may be nothing but noise; None where it is more, and in files that do not say."""
    beyond = comparison.get("beyond_noise", True)
    if beyond is None:
        return f"fewer than {ENOUGH_ROUNDS} rounds cannot tell it from noise"
    return None if beyond else "within its rounds' noise"


def speedup_field(comparisons: list[dict[str, Any]]) -> dict[str, float]:
    """The `speedup` of prefill.json: a sentence -> a number."""
    field = {}
    for c in comparisons:
        field[f"{c['row']} {c['mode']} over {c['baseline']} {c['baseline_mode']}, {point(c)}"] = c["ratio"]
    return field


def refusal(checks: list[dict[str, Any]]) -> str | None:
    """Why no speed-up is reported, or None when everything that should agree does."""
    broken = [check["name"] for check in checks if not check["agrees"]]
    return None if not broken else "outputs that should agree differ by more than rounding: " + "; ".join(broken)
