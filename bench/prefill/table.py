"""The rows of a prefill result as text, for the terminal and for the page, and what to know about their numbers."""

from typing import Any

from ..command import number, table
from .speedup import BASELINES, doubt, label, place, same_mode

TIMES = {"vision": "vision_ms", "projector": "projector_ms", "insert": "insert_ms", "prefill": "prefill_ms"}
# Not of the insertion: what it takes is launches, not the few bytes that it moves.
FLOORS = ("vision", "projector", "prefill", "total")


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
        table(columns, [[row[c] for c in columns] for row in shown], left=len(columns) - 7),
        "",
        "Milliseconds from pixel values on the device to the first token on the host, preprocessing not included.",
    ]
    if full:
        more = [c for c in next(iter(shown), {}) if c not in columns[3:] and c not in ("p10 to p90", "remark")]
        at = f"{ceilings['flops'] / 1e12:.3g} TFLOP/s, {ceilings['bandwidth'] / 1e9:.0f} GB/s ({ceilings['source']})"
        out += ["", table(more, [[row[c] for c in more] for row in shown], left=3), f"Floors at {at}.", ""]
    out += [f"{label(row)} {row['mode']}, {place(row)}: {row['failed']}" for row in rows if row["failed"]]
    doubted = [(c, why) for c in same_mode(result["comparisons"]).values() if (why := doubt(c))]
    out += [f"note: {c['ratio']:.2f}x of {c['row']} {c['mode']}, {place(c)}: {why}" for c, why in doubted]
    out += [f"note: {note}" for note in result["notes"]]
    out += [f"checked: {sentence(check)}" for check in result["checks"]]
    return "\n".join(out + [f"\nNO SPEED-UP IS REPORTED: {result['refused']}"] * bool(result["refused"]))


def sentence(check: dict[str, Any]) -> str:
    error = "not finite" if check["error"] is None else f"{check['error']:.1e}"
    return f"{check['name']}: difference {error} (allowed {check['bound']:.0e})" + "  DIFFERS" * (not check["agrees"])
