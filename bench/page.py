"""One HTML page from result files: no script, no network, charts inside, readable printed and on a narrow screen."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from . import side_by_side
from .speedup import doubt, label, names_savings, where
from .stats import median
from .table import number
from .targets import sentence

STYLE = """
:root { color-scheme: light dark; --line: #8884; --weak: #777; --own: #e67e2222; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
h2, dd, figcaption, .wrap { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; width: 100%; }
th, td { padding: 0.25rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; } thead { display: table-header-group; }
#side-by-side th { white-space: normal; overflow-wrap: anywhere; min-width: 4rem; max-width: 14rem; }
.text { text-align: left; }
.wrap { white-space: normal; }
tr.own { background: var(--own); }
tr.new td { border-top: 2px solid var(--weak); }
figure { margin: 1.5rem 0; } figcaption { font-size: 0.85rem; color: var(--weak); }
img { width: 46rem; max-width: 100%; height: auto; background: white; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: 0.85rem; }
dt { color: var(--weak); } dd { margin: 0; }
.warn { border-left: 4px solid #c0392b; padding: 0.25rem 0.75rem; overflow-wrap: anywhere; }
@media screen and (max-width: 40rem) {
  body { padding: 0.5rem; } h1 { font-size: 1.25rem; } th, td { padding: 0.25rem 0.35rem; }
  table { font-size: 0.8rem; } .wrap, #side-by-side th:nth-child(n + 6) { min-width: 10rem; }
  /* The first column stays while the numbers are scrolled past it. */
  .scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; background: Canvas; }
  .own td:first-child { background: linear-gradient(var(--own), var(--own)), Canvas !important; }
}
@media print {
  :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 10px; }
  dl, figcaption { font-size: 9px; } .scroll { overflow: visible; }
  table { font-size: 8px; } th, td { padding: 1px 3px; white-space: normal; }
  th, .text { white-space: nowrap; } .wrap { white-space: normal; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } img { width: 125mm; }
}
@page { margin: 12mm; }
"""
_STAGES = ("vision", "projector", "insert", "prefill", "first_token")


def render(results: Sequence[tuple[str, dict[str, Any]]], charts: Sequence[dict[str, bytes]], note: str | None) -> str:
    """results: (name of the file, its content); charts: of each file, name -> PNG."""
    parts = [_section(name, result, drawn) for (name, result), drawn in zip(results, charts, strict=True)]
    warning = f'<p class="warn">{html.escape(note)}</p>' if note else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An icon of its own: a browser would ask the place the page came from for one.
        '<link rel="icon" href="data:,">'
        f"<title>stf-kernels: measurements</title><style>{STYLE}</style></head><body>"
        f"<h1>stf-kernels: measurements</h1>{warning}{_side_by_side(results)}{''.join(parts)}</body></html>\n"
    )


def _side_by_side(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    header, rows = side_by_side.lines(results)
    if not rows:
        return ""
    own = [i for i, row in enumerate(rows) if row[0].startswith("llava-stf/fused")]
    new = [i for i in range(1, len(rows)) if rows[i][1:5] != rows[i - 1][1:5]]
    title = "<h2>Side by side: ms to the first token (speed-up over LLaVA-1.5 in the same file)</h2>"
    return title + _table("side-by-side", header, rows, 2, own, new=new)


def _section(name: str, result: dict[str, Any], drawn: dict[str, bytes]) -> str:
    facts = {key: result.get(key) for key in (
        "device", "dtype", "preset", "weights", "attention", "output_tokens", "torch", "triton", "transformers",
        "commit", "clock_mhz",
    )}  # fmt: skip
    if clocks := [clock for clock in result.get("clocks_mhz", []) if clock]:
        facts["clock_mhz"] = f"{min(clocks):.0f} to {max(clocks):.0f} behind the rounds"
    if ceilings := result.get("ceilings"):
        facts["ceilings"] = (
            f"{ceilings['flops'] / 1e12:.3g} TFLOP/s, {ceilings['bandwidth'] / 1e9:.0f} GB/s, {ceilings['source']}"
        )
    if flags := result.get("flags"):
        facts["flags"] = ", ".join(f"{name} {value}" for name, value in flags.items())
    listed = "".join(
        f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in facts.items()
        if value is not None
    )
    warnings = []
    if not result.get("complete", True):
        warnings.append("This run is incomplete: it was interrupted or ran out of time.")
    if result.get("refused"):
        warnings.append(f"No speed-up is reported: {result['refused']}")
    warnings += [f"Note: {text}" for text in result.get("notes", [])]
    if result["kind"] == "prefill" and not names_savings(result):
        warnings.append(
            "This file is from before rows named their savings: both of its LLaVA-STF rows had all of them."
        )
    images = "".join(_figure(chart, png) for chart, png in drawn.items())
    body = {"prefill": _prefill, "kernels": _kernels, "tests": _tests}[result["kind"]](result, images)
    warned = "".join(f'<p class="warn">{html.escape(text)}</p>' for text in warnings)
    return f"<h2>{html.escape(result['kind'])}: {html.escape(name)}</h2><dl>{listed}</dl>{warned}{body}"


_ALT = {
    "stages": "Milliseconds to the first token: medians of the stages stacked, with the median total behind the bar",
    "speedup": "Speed-up over LLaVA-1.5 in the same mode against batch; bars are p10 to p90 of the rounds",
    "speedup-text": "Speed-up over LLaVA-1.5 in the same mode against text tokens; bars are p10 to p90 of the rounds",
    "speedup-images": "Speed-up over LLaVA-1.5 in the same mode against images of a sequence; bars are p10 to p90",
    "floor": "Measured over floor of the vision tower, the projector and the language model; the line is the floor",
    "kernels": "The projector's time over its floor against batch, per provider; the line is the floor",
}


def _figure(chart: str, png: bytes) -> str:
    alt, data = html.escape(_ALT[chart]), base64.b64encode(png).decode()
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'


def _table(
    name: str, header: Sequence[str], rows: Sequence[Sequence[str]], text: int, own: Sequence[int] = (),
    wrap: int = -1, new: Sequence[int] = (),
) -> str:  # fmt: skip
    """The first `text` columns stand left; rows in `own` are this library's, above those in `new` there is a line;
    the column `wrap` may break its lines."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["text wrap" if i == wrap else "text" if i < text else "" for i in range(len(row))]
        marks = [f' class="{kind}"' if kind else "" for kind in kinds]
        return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    def kinds(i: int) -> str:
        named = [kind for kind, members in (("own", own), ("new", new)) if i in members]
        return f' class="{" ".join(named)}"' if named else ""

    body = "".join(f"<tr{kinds(i)}>{cells('td', row)}</tr>" for i, row in enumerate(rows))
    return (
        f'<div class="scroll"><table id="{name}"><thead><tr>{cells("th", header)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _with_share(milliseconds: float | None, share: float | None) -> str:
    return number(milliseconds, 2) + ("" if share is None else f" ({100 * share:.1f} %)")


def _prefill(result: dict[str, Any], images: str) -> str:
    """What a reader asks first, first: how long and how much faster; then where the time goes, floors and checks."""
    speedups = {
        (c["row"], where(c), c["mode"]): c for c in result["comparisons"] if c["mode"] == c["baseline_mode"]
    }  # fmt: skip
    totals, stages, floors, own = [], [], [], []
    for index, row in enumerate(result["rows"]):
        found = speedups.get((label(row), where(row), row["mode"]))
        ratio = f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else "-"
        shares = row.get("shares") or {"projector_ms": row["projector_share"]}
        name = (label(row), row["mode"], str(row["batch"]), str(row["text_tokens"]), str(row["image_tokens"]))
        totals.append((*name[:3], number(row["total_ms"], 2), ratio, number(row["spread_percent"]),
                       str(row.get("rounds", len(row["samples"]["total_ms"]))), *name[3:],
                       number(row["decode_ms_per_token"], 2), number(row["peak_mb"], 0), number(row["kv_mb"]),
                       row["failed"] or (found and doubt(found)) or ""))  # fmt: skip
        # Of a narrow screen the first columns are seen at once.
        stages.append((*name[:3], *(_with_share(row[f"{s}_ms"], shares.get(f"{s}_ms")) for s in _STAGES),
                       number(row["preprocess_ms"], 2), *name[3:]))  # fmt: skip
        ratios = row["floor_ratio"]
        floors.append((*name[:3], *(number(ratios.get(f"{s}_ms"), 2) for s in (*_STAGES[:-1], "total")), *name[3:]))
        if row["projector"] == "fused":
            own.append(index)
    places = [(where(row), row["mode"]) for row in result["rows"]]
    new = [i for i in range(1, len(places)) if places[i] != places[i - 1]]
    name = ("model", "mode", "batch", "text", "image tokens")
    checks = [
        (c["name"], _error(c["error"]), f"{c['bound']:.0e}", "yes" if c["agrees"] else "NO") for c in result["checks"]
    ]
    parts = [
        "<h3>To the first token</h3>",
        _table("totals", (*name[:3], "total ms", "speed-up [p10, p90]", "spread %", "rounds", *name[3:],
                          "decode ms / token", "peak MB", "KV MB", ""), totals, 2, own, 12, new),
        _reading(result),
        _savings(result),
        _targets(result),
        images,
        "<h3>Where the time goes, ms (share of the total)</h3>",
        _table("stages", (*name[:3], "vision", "projector", "insert", "prefill", "first token", "preprocess",
                          *name[3:]), stages, 2, own, new=new),
        _wall(result),
        "<h3>Measured over floor</h3>",
        _table("floors", (*name[:3], "vision", "projector", "insert", "prefill", "total", *name[3:]), floors, 2, own,
               new=new),
        "<h3>Checked before timing</h3>",
        _table("checks", ("outputs", "difference", "allowed", "agree"), checks, 1, wrap=0),
    ]  # fmt: skip
    return "".join(parts)


_ROWS = {
    "llava-1.5/mlp2x": "LLaVA-1.5 as transformers runs it, the baseline of every speed-up",
    "llava-1.5-skip/mlp2x": "the same without the tower layer whose output nobody reads",
    "llava-1.5-pool/mlp2x": "the same, its image tokens averaged 2x2 behind the projector",
    "llava-stf/reference": "LLaVA-STF, its projector in plain PyTorch",
    "llava-stf/fused": "LLaVA-STF, the same projector with the fused operators of this library",
    "llava-stf/fused+savings": "the same with everything else that this library saves, listed below",
}
_READING = (
    "Total: from pixel values on the device to the first token on the host; preprocessing is not in it. Times are "
    "medians of interleaved rounds, spread is (p90 - p10) / median. A speed-up is the median over rounds of the total "
    "of LLaVA-1.5 over the row's in the same round and mode, with its p10 and p90. A floor is the least time that the "
    "operations and bytes of a stage take at the ceilings above. All rows have the same photograph, text, attention, "
    "dtype and output length. The method in full: bench/METHOD.md."
)


def _reading(result: dict[str, Any]) -> str:
    """What the rows are and what the numbers mean, for a reader who has this page alone."""
    present = dict.fromkeys(label(row) for row in result["rows"])
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{_ROWS[name]}</dd>" for name in present if name in _ROWS)
    return f'<dl id="rows">{listed}</dl><p>{_READING}</p>'


def _savings(result: dict[str, Any]) -> str:
    used = {name for row in result["rows"] if row["model"] == "llava-stf" for name in row.get("savings", ())}
    means = {name: what for name, what in result.get("savings_mean", {}).items() if name in used}
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(what)}</dd>" for name, what in means.items())
    return f"<p>+savings is LLaVA-STF with everything that is saved beyond the projector:</p><dl>{listed}</dl>" * bool(
        means
    )


def _targets(result: dict[str, Any]) -> str:
    listed = "".join(f"<li>{html.escape(sentence(target))}</li>" for target in result.get("targets", []))
    return f'<ul class="wrap" id="targets">{listed}</ul>' if listed else ""


def _wall(result: dict[str, Any]) -> str:
    """What a stage takes by the host's clock; on a CPU that is the table before."""
    rows, own = [], []
    for row in result["rows"]:
        samples = row.get("wall_samples") or {}
        if not samples.get("total_ms"):
            continue
        if row["projector"] == "fused":
            own.append(len(rows))
        series = [[value for value in samples[f"{s}_ms"] if value is not None] for s in (*_STAGES, "total")]
        rows.append((label(row), row["mode"], str(row["batch"]), str(row["text_tokens"]), str(row["image_tokens"]),
                     *(number(median(values) if values else None, 2) for values in series)))  # fmt: skip
    header = ("model", "mode", "batch", "text", "image tokens", "vision", "projector", "insert", "prefill",
              "first token", "total")  # fmt: skip
    title = "<h3>Wall clock, ms: waiting for the device at each boundary</h3>"
    return title + _table("wall", header, rows, 2, own) if rows else ""


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _kernels(result: dict[str, Any], images: str) -> str:
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
    own = [i for i, r in enumerate(result["rows"]) if r["provider"] == "stf"]
    return images + _table("kernels", header, rows, 4, own, wrap=len(header) - 1)


def _tests(result: dict[str, Any], images: str) -> str:
    counts = f"<p>{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped.</p>"
    failures = "".join(f"<li>{html.escape(name)}</li>" for name in result.get("failures", []))
    return counts + (f"<ul>{failures}</ul>" if failures else "")
