"""A prefill result as the terminal shows it: one table, then what to know about its numbers, then what was checked."""

from __future__ import annotations

from typing import Any

from ..command import number, table
from .speedup import BASELINE, doubt, label, place, same_mode

STAGES = {"vision": "vision_ms", "projector": "projector_ms", "insert": "insert_ms", "prefill": "prefill_ms"}
VARIED = {"mode": "mode", "batch": "batch", "text_tokens": "text tokens", "images": "images"}


def report(result: dict[str, Any], *, full: bool) -> str:
    """full: every column, and the ratios to the floors."""
    rows = result["rows"]
    texts = ", ".join(str(n) for n in dict.fromkeys(row["text_tokens"] for row in rows)) or "no"
    rounds = max((row["rounds"] for row in rows), default=0)
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "transformers"))
    out = [
        f"{result['device']}   {result['dtype']}, {versions}, commit {result['commit'][:12]}",
        f"{result['preset']}, weights: {result['weights']}, {texts} text tokens, median of {rounds} interleaved rounds",
        "",
        table(*_table(result, full)),
        "",
        "Milliseconds from pixel values on the device to the first token on the host, preprocessing not included.",
    ]
    used = {name for row in rows if row["model"] == "llava-stf" for name in row["savings"]}
    out += [f"+savings, {name}: {what}." for name, what in result["savings_mean"].items() if name in used]
    if full:
        ceilings = result["ceilings"]
        at = f"{ceilings['flops'] / 1e12:.3g} TFLOP/s and {ceilings['bandwidth'] / 1e9:.0f} GB/s"
        out += ["", f"Measured over floor, at {at} ({ceilings['source']}):", table(*_floors(rows)), ""]
    out += [f"{label(row)} {row['mode']}, {place(row)}: {row['failed']}" for row in rows if row["failed"]]
    for row in rows:
        if row["mode"] == "compile" and row["warm_up_s"]:
            out.append(f"{label(row)} compile, {place(row)}: {row['warm_up_s']:.0f} s before the first timed run")
    out += [f"note: {note}" for note in (*_doubts(result), *result["notes"])]
    out += [f"checked: {_sentence(check)}" for check in result["checks"]]
    if result["refused"]:
        out += ["", f"NO SPEED-UP IS REPORTED: {result['refused']}"]
    return "\n".join(out)


def _table(result: dict[str, Any], full: bool) -> tuple[list[str], list[list[str]]]:
    rows, speedups = result["rows"], same_mode(result["comparisons"])
    varied = [field for field in VARIED if full or len({row[field] for row in rows}) > 1]
    header = ["model", *(VARIED[field] for field in varied), "image tokens", "total ms", "speed-up", *STAGES]
    decoded = full and any(row["decode_ms_per_token"] is not None for row in rows)
    if full:
        header += ["first", "preprocess", "spread %", "projector %", "peak MB", "KV MB"]
        header += ["decode ms/token"] * decoded
    lines = []
    for row in rows:
        found, share = speedups.get((label(row), place(row), row["mode"])), row["projector_share"]
        ratio = "1.00x" if label(row) == BASELINE and row["total_ms"] and not result["refused"] else "-"
        line = [label(row), *(str(row[field]) for field in varied), str(row["image_tokens"]), number(row["total_ms"])]
        line += [f"{found['ratio']:.2f}x" if found else ratio, *(number(row[stage]) for stage in STAGES.values())]
        if full:
            line += [number(row[name]) for name in ("first_token_ms", "preprocess_ms", "spread_percent")]
            line += [number(None if share is None else 100 * share), number(row["peak_mb"], 0), number(row["kv_mb"])]
            line += [number(row["decode_ms_per_token"])] * decoded
        lines.append(line)
    return header, lines


def _floors(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Not of the insertion: what it takes is launches, not the few bytes that it moves."""
    stages = {**STAGES, "total": "total_ms"}
    del stages["insert"]
    lines = [
        [label(row), row["mode"], str(place(row)), *(number(row["floor_ratio"][s], 2) for s in stages.values())]
        for row in rows
    ]
    return ["model", "mode", "at", *stages], lines


def _doubts(result: dict[str, Any]) -> list[str]:
    """One sentence for all speed-ups over the same mode that may be noise for the same reason."""
    named: dict[str, list[str]] = {}
    for (row, where, mode), c in same_mode(result["comparisons"]).items():
        if why := doubt(c):
            ratio = f"{c['ratio']:.2f}x [{c['low']:.2f}, {c['high']:.2f}]"
            named.setdefault(why, []).append(f"{row} {mode}, {where} {ratio}")
    return [f"{why}: {'; '.join(names)}" for why, names in named.items()]


def _sentence(check: dict[str, Any]) -> str:
    error = "not finite" if check["error"] is None else f"{check['error']:.1e}"
    return f"{check['name']}: difference {error} (allowed {check['bound']:.0e})" + "  DIFFERS" * (not check["agrees"])
