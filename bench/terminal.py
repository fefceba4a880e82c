"""A prefill result as the terminal shows it: one table, then what was checked, what failed, what was refused."""

from __future__ import annotations

from typing import Any

from .speedup import doubt, label, point, where
from .table import number, render
from .targets import sentence

HEADER = (
    "model", "projector", "mode", "batch", "text", "image", "preprocess", "vision", "projector", "insert", "prefill",
    "first", "total", "spread", "projector's", "speed-up", "peak", "KV", "decode",
)  # fmt: skip
TIMES = ("preprocess", "vision", "projector", "insert", "prefill", "first_token", "total")
UNITS = ("", "", "", "", "tokens", "tokens", *["ms"] * 7, "%", "share %", "", "MB", "MB", "ms/token")


def report(result: dict[str, Any]) -> str:
    """What the terminal shows."""
    speedups = {
        (c["row"], where(c), c["mode"]): c["ratio"] for c in result["comparisons"] if c["mode"] == c["baseline_mode"]
    }
    lines = []
    columns = len(HEADER) - (not result["decode_tokens"])  # decoding, only where there was any
    for row in result["rows"]:
        key = (label(row), where(row), row["mode"])
        baseline = label(row) == "llava-1.5/mlp2x" and row["total_ms"] is not None and not result["refused"]
        share = row["projector_share"]
        lines.append((
            *_name(row), *(number(row[f"{stage}_ms"]) for stage in TIMES),
            number(row["spread_percent"]), number(None if share is None else 100 * share),
            "1.00x" if baseline else f"{speedups[key]:.2f}x" if key in speedups else "-",
            number(row["peak_mb"], 0), number(row["kv_mb"]), number(row["decode_ms_per_token"]),
        ))  # fmt: skip
    out = [
        "",
        f"{result['device']}   {result['dtype']}, attention {result['attention']}, torch {result['torch']}, "
        f"transformers {result['transformers']}, commit {result['commit'][:12]}",
        f"{result['preset']}, {_texts(result)} text tokens, {_images(result)} of one photograph per sequence, "
        f"one output token, weights: {result['weights']}; "
        f"median of {max((row['rounds'] for row in result['rows']), default=0)} interleaved rounds",
        "",
        render(HEADER[:columns], [line[:columns] for line in (UNITS, *lines)], left=3),
        "",
        *_savings(result),
        "total: from pixel values on the device to the first token on the host, preprocessing not included.",
    ]
    out += ["", *_floors(result), ""]
    out += [f"{label(row)} {row['mode']}, {point(row)}: {row['failed']}" for row in result["rows"] if row["failed"]]
    out += [
        f"{label(row)} {row['mode']}, {point(row)}: {row['warm_up_s']:.0f} s before the first timed run"
        for row in result["rows"] if row["mode"] == "compile" and row.get("warm_up_s")
    ]  # fmt: skip
    out += [f"target: {sentence(target)}" for target in result["targets"]]
    out += [f"note: {note}" for note in (*_doubts(result), *result["notes"])]
    out += ["checked: " + _sentence(check) for check in result["checks"]]
    if result["refused"]:
        out += ["", f"NO SPEED-UP IS REPORTED: {result['refused']}"]
    return "\n".join(out)


def _name(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = (str(row[key]) for key in ("batch", "text_tokens", "image_tokens"))
    return (row["model"], label(row).removeprefix(f"{row['model']}/"), row["mode"], *numbers)


def _savings(result: dict[str, Any]) -> list[str]:
    """What +savings stands for."""
    used = [name for row in result["rows"] if row["model"] == "llava-stf" for name in row["savings"]]
    return [f"+savings, {name}: {what}." for name, what in result["savings_mean"].items() if name in used]


def _doubts(result: dict[str, Any]) -> list[str]:
    """One sentence for all speed-ups over the same mode that may be noise for the same reason."""
    named: dict[str, list[str]] = {}
    for c in result["comparisons"]:
        why = doubt(c)
        if why and c["mode"] == c["baseline_mode"]:
            ratio = f"{c['ratio']:.2f}x [{c['low']:.2f}, {c['high']:.2f}]"
            named.setdefault(why, []).append(f"{c['row']} {c['mode']}, {point(c)} {ratio}")
    return [f"{why}: {'; '.join(names)}" for why, names in named.items()]


def _floors(result: dict[str, Any]) -> list[str]:
    """Measured over floor, stage by stage."""
    stages = ("vision", "projector", "insert", "prefill", "total")
    lines = [
        (*_name(row), *(number(row["floor_ratio"][f"{stage}_ms"], 2) for stage in stages)) for row in result["rows"]
    ]
    ceilings = result["ceilings"]
    title = (
        f"Measured over floor, at {ceilings['flops'] / 1e12:.3g} TFLOP/s and {ceilings['bandwidth'] / 1e9:.0f} GB/s "
        f"({ceilings['source']}):"
    )
    return [title, render(("model", "projector", "mode", "batch", "text", "image", *stages), lines, left=3)]


def _sentence(check: dict[str, Any]) -> str:
    error = "not finite" if check["error"] is None else f"{check['error']:.1e}"
    verdict = "" if check["agrees"] else "  DIFFERS"
    return f"{check['name']}: difference {error} (allowed {check['bound']:.0e}){verdict}"


def _images(result: dict[str, Any]) -> str:
    counts = list(dict.fromkeys(row.get("images", 1) for row in result["rows"])) or [1]
    return f"{', '.join(map(str, counts))} {'image' if counts == [1] else 'images'}"


def _texts(result: dict[str, Any]) -> str:
    return ", ".join(str(n) for n in dict.fromkeys(row["text_tokens"] for row in result["rows"])) or "no"
