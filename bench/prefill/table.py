"""From the rows of a prefill to speed-ups over the stock model, and to text for the terminal and the page.

No speed-up is reported where outputs that should agree do not.
"""

from statistics import median
from typing import Any

from ..command import number, table
from ..stats import ENOUGH_ROUNDS, paired_ratio
from .presets import FAMILIES, Point

TIMES = {"vision": "vision_ms", "projector": "projector_ms", "insert": "insert_ms", "prefill": "prefill_ms"}
# Not of the insertion: what it takes is launches, not the few bytes that it moves.
FLOORS = ("vision", "projector", "prefill", "total")
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


def cells(result: dict[str, Any]) -> list[dict[str, str]]:
    """Column -> what it says, for every row."""
    speedups, said = same_mode(result["comparisons"]), []
    for row in result["rows"]:
        speedup, share = speedups.get((label(row), place(row), row["mode"])), row["projector_share"]
        if label(row) in BASELINES and row["total_ms"] is not None and not result["refused"]:
            speedup = {"ratio": 1.0, "low": 1.0, "high": 1.0, "beyond_noise": True}
        found = {"model": label(row), "mode": row["mode"], "at": str(place(row))}
        found |= {"image tokens": str(row["image_tokens"]), "total ms": number(row["total_ms"])}
        found["speed-up"] = f"{speedup['ratio']:.2f}x" if speedup else "-"
        found["p10 to p90"] = f"{speedup['low']:.2f} to {speedup['high']:.2f}" if speedup else ""
        found |= {name: number(row[stage]) for name, stage in TIMES.items()}
        found |= {"first": number(row["first_token_ms"]), "projector %": number(None if share is None else 100 * share)}
        found |= {"spread %": number(row["spread_percent"]), "rounds": str(row["rounds"])}
        found |= {"peak MB": number(row["peak_mb"], 0), "KV MB": number(row["kv_mb"])}
        found |= {f"{name} / floor": number(row["floor_ratio"].get(f"{name}_ms"), 2) for name in FLOORS}
        said.append(found | {"remark": row["failed"] or (speedup and doubt(speedup)) or ""})
    return said


def report(result: dict[str, Any], *, full: bool) -> str:
    """What the terminal shows. full: every column."""
    rows, shown = result["rows"], cells(result)
    columns = ["model", "mode", "at", "image tokens", "total ms", "speed-up", *TIMES]
    if not full:
        columns = [c for c in columns if c not in ("mode", "at") or len({row[c] for row in shown}) > 1]
    rounds, ceilings = max((row["rounds"] for row in rows), default=0), result["ceilings"]
    out = [
        "{device}   {dtype}, torch {torch}, transformers {transformers}, commit {commit:.12}".format(**result),
        f"{result['preset']}, weights: {result['weights']}, {shown[0]['at'] if shown else 'nothing measured'}, "
        f"median of {rounds} interleaved rounds",
        "",
        table(shown, columns, left=len(columns) - 7),
        "",
        "Milliseconds from pixel values on the device to the first token on the host, preprocessing not included.",
    ]
    if full:
        more = [c for c in next(iter(shown), {}) if c not in columns[3:] and c not in ("p10 to p90", "remark")]
        at = f"{ceilings['flops'] / 1e12:.3g} TFLOP/s, {ceilings['bandwidth'] / 1e9:.0f} GB/s ({ceilings['source']})"
        out += ["", table(shown, more, left=3), f"Floors at {at}.", ""]
    out += [f"{label(row)} {row['mode']}, {place(row)}: {row['failed']}" for row in rows if row["failed"]]
    doubted = [(c, why) for c in same_mode(result["comparisons"]).values() if (why := doubt(c))]
    out += [f"note: {c['ratio']:.2f}x of {c['row']} {c['mode']}, {place(c)}: {why}" for c, why in doubted]
    out += [f"note: {note}" for note in result["notes"]]
    out += [f"checked: {sentence(check)}" for check in result["checks"]]
    return "\n".join(out + [f"\nNO SPEED-UP IS REPORTED: {result['refused']}"] * bool(result["refused"]))


def sentence(check: dict[str, Any]) -> str:
    error = "not finite" if check["error"] is None else f"{check['error']:.1e}"
    return f"{check['name']}: difference {error} (allowed {check['bound']:.0e})" + "  DIFFERS" * (not check["agrees"])
