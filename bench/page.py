"""One HTML page from result files: no script, no network, charts inside, readable printed and on a narrow screen."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from .speedup import label
from .table import number

STYLE = """
:root { color-scheme: light dark; --line: #8884; --weak: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; width: 100%; }
th, td { padding: 0.25rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.text, td.text { text-align: left; }
img { max-width: 100%; height: auto; background: white; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: 0.85rem; }
dt { color: var(--weak); } dd { margin: 0; overflow-wrap: anywhere; }
.warn { border-left: 4px solid #c0392b; padding: 0.25rem 0.75rem; }
@media (max-width: 40rem) { body { padding: 0.5rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; } }
@media print { body { max-width: none; font-size: 10px; } .scroll { overflow: visible; }
  table { font-size: 7px; } figure, tr { break-inside: avoid; } th, td { padding: 1px 3px; } }
"""


def render(results: Sequence[tuple[str, dict[str, Any]]], charts: Sequence[dict[str, bytes]], note: str | None) -> str:
    """results: (name of the file, its content); charts: of each file, name -> PNG."""
    parts = [_section(name, result, drawn) for (name, result), drawn in zip(results, charts, strict=True)]
    warning = f'<p class="warn">{html.escape(note)}</p>' if note else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>stf-kernels: measurements</title><style>{STYLE}</style></head><body>"
        f"<h1>stf-kernels: measurements</h1>{warning}{''.join(parts)}</body></html>\n"
    )


def _section(name: str, result: dict[str, Any], drawn: dict[str, bytes]) -> str:
    facts = {key: result.get(key) for key in (
        "device", "dtype", "preset", "attention", "torch", "triton", "transformers", "commit", "clock_mhz",
    )}  # fmt: skip
    listed = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in facts.items()
        if value is not None
    )
    warnings = []
    if not result.get("complete", True):
        warnings.append("This run is incomplete: it was interrupted or ran out of time.")
    if result.get("refused"):
        warnings.append(f"No speed-up is reported: {result['refused']}")
    warnings += [f"Note: {text}" for text in result.get("notes", [])]
    body = {"prefill": _prefill, "kernels": _kernels, "tests": _tests}[result["kind"]](result)
    images = "".join(
        f'<figure><img alt="{html.escape(_ALT[chart])}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(_ALT[chart])}</figcaption></figure>"
        for chart, png in drawn.items()
    )
    warned = "".join(f'<p class="warn">{html.escape(text)}</p>' for text in warnings)
    return f"<h2>{html.escape(result['kind'])}: {html.escape(name)}</h2><dl>{listed}</dl>{warned}{body}{images}"


_ALT = {
    "stages": "Milliseconds to the first token by stage, one bar per row",
    "speedup": "Speed-up over LLaVA-1.5 in the same mode against batch; bars are p10 to p90",
    "floor": "Measured over floor of the vision tower, the projector and the language model",
    "kernels": "The projector's time over its floor against batch, per provider",
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        mark = ' class="text"'
        return "".join(f"<{tag}{mark if i < text else ''}>{html.escape(c)}</{tag}>" for i, c in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _prefill(result: dict[str, Any]) -> str:
    times = ("preprocess", "vision", "projector", "insert", "prefill", "first_token", "total", "decode")
    rows = []
    speedups = {
        (c["row"], c["batch"], c["text_tokens"], c["mode"]): c
        for c in result["comparisons"] if c["mode"] == c["baseline_mode"]
    }  # fmt: skip
    for row in result["rows"]:
        found = speedups.get((label(row), row["batch"], row["text_tokens"], row["mode"]))
        ratio = f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else "-"
        share = row["projector_share"]
        rows.append((
            row["model"], row["projector"], row["mode"], str(row["batch"]), str(row["text_tokens"]),
            str(row["image_tokens"]),
            *(number(row["decode_ms_per_token" if t == "decode" else f"{t}_ms"], 2) for t in times),
            number(row["spread_percent"]), number(None if share is None else 100 * share),
            number(row["floor_ratio"]["total_ms"], 2), ratio, number(row["peak_mb"], 0), number(row["kv_mb"]),
            row["failed"] or "",
        ))  # fmt: skip
    header = (
        "model", "projector", "mode", "batch", "text", "image tokens", "preprocess", "vision", "projector", "insert",
        "prefill", "first token", "total ms", "decode / token", "spread %", "projector %", "total / floor",
        "speed-up [p10, p90]", "peak MB", "KV MB", "",
    )  # fmt: skip
    checks = [
        (
            c["name"],
            "-" if c["error"] is None else f"{c['error']:.1e}",
            f"{c['bound']:.0e}",
            "yes" if c["agrees"] else "NO",
        )
        for c in result["checks"]
    ]
    return _table(header, rows, 3) + "<h3>Checked before timing</h3>" + _table(
        ("outputs", "difference", "allowed", "agree"), checks, 1
    )  # fmt: skip


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _kernels(result: dict[str, Any]) -> str:
    eager = {
        (r.get("pass"), r["stage"], r["batch"], r["dtype"]): r["us"] or r["us_eager"]
        for r in result["rows"] if r["provider"] == "eager"
    }  # fmt: skip
    rows = []
    for r in result["rows"]:
        own, base = r["us"] or r["us_eager"], eager.get((r.get("pass"), r["stage"], r["batch"], r["dtype"]))
        rows.append((
            r["stage"], r.get("pass", "forward"), r["provider"], r["dtype"], str(r["batch"]), number(r["us"]),
            number(r["us_eager"]), number(r["floor_us"]), f"{own / r['floor_us']:.2f}" if own else "-",
            f"{base / own:.2f}" if own and base else "-",
            _error(r["rel_error"]), r.get("failed") or "",
        ))  # fmt: skip
    header = ("stage", "pass", "provider", "dtype", "batch", "us", "us eager", "floor us", "us / floor", "vs eager",
              "error", "")  # fmt: skip
    return _table(header, rows, 4)


def _tests(result: dict[str, Any]) -> str:
    counts = f"<p>{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped.</p>"
    failures = "".join(f"<li>{html.escape(name)}</li>" for name in result.get("failures", []))
    return counts + (f"<ul>{failures}</ul>" if failures else "")
