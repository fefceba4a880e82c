"""PNG charts of result files. matplotlib is imported here and nowhere else, when a chart is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from functools import partial
from typing import Any

from ..kernels.table import ratios
from ..prefill.speedup import BASELINE, label, place, same_mode

# One hue per stage, apart in lightness too: the charts are read printed in grey and by colour-blind eyes.
STAGE_COLOURS = {
    "vision_ms": ("vision tower", "#1b4f72"),
    "projector_ms": ("projector", "#e67e22"),
    "insert_ms": ("embedding, insertion", "#7f8c8d"),
    "prefill_ms": ("language model", "#5dade2"),
}
LINES = ("#1b4f72", "#e67e22", "#27ae60", "#8e44ad", "#7f8c8d", "#c0392b", "#17a2b8", "#b8860b")
AXES = {"batch": "batch", "text_tokens": "text tokens", "images": "images of a sequence"}
NO_MATPLOTLIB = "matplotlib is not installed, so there are no charts; install it with: pip install matplotlib"
Chart = Callable[[dict[str, Any]], "bytes | None"]


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_all(result: dict[str, Any]) -> dict[str, tuple[bytes, str]]:
    """Name -> (PNG, what it shows), for every chart that the file has the data for."""
    drawn = {name: (draw(result), says) for name, (draw, says) in CHARTS.get(result["kind"], {}).items()}
    return {name: (png, says) for name, (png, says) in drawn.items() if png}


def _figure(height: float) -> tuple[Any, Any]:
    """Six inches wide: at the 400 pixels of a telephone its letters are still eight pixels high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _png(figure: Any, columns: int) -> bytes:
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def styles(keys: list[tuple[Any, Any]]) -> list[dict[str, str]]:
    """(what, how) of every line -> a colour and a mark per what, dashes per how: no two lines alike."""
    what, how = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    return [
        {
            "color": LINES[what.index(w) % len(LINES)],
            "marker": "osD^vP"[(what.index(w) + how.index(h)) % 6],
            "linestyle": ("-", "--", ":", "-.")[how.index(h) % 4],
        }
        for w, h in keys
    ]


def stages(result: dict[str, Any]) -> bytes | None:
    """A bar per row, its stages stacked, the total and the speed-up behind it."""
    rows = [row for row in result["rows"] if row["total_ms"] is not None]
    if not rows:
        return None
    speedups = same_mode(result["comparisons"])
    several = len({(place(row), row["mode"]) for row in rows}) > 1
    names = [label(row) + f"\n{row['mode']}, {place(row)}" * several for row in rows]
    figure, axes = _figure(1.0 + (0.42 if several else 0.36) * len(rows))
    left = [0.0] * len(rows)
    for stage, (title, colour) in STAGE_COLOURS.items():
        widths = [row[stage] or 0.0 for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=title, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, row in enumerate(rows):
        end, found = row["total_ms"], speedups.get((label(row), place(row), row["mode"]))
        if row["vision_ms"] is None:  # a total alone
            axes.barh(index, end, color="#d5dbdb", height=0.7)
        said = f"  {end:,.0f} ms" if end >= 100 else f"  {end:.1f} ms"
        axes.annotate(said + (f"   {found['ratio']:.2f}x" if found else ""), (end, index), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.28, y=0.5 / len(rows))
    axes.set_xlabel("milliseconds to the first token", fontsize=8)
    return _png(figure, 4)


def speedup(result: dict[str, Any], axis: str = "batch") -> bytes | None:
    """A line per row, mode and what else was fixed, where `axis` took two values or more."""
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for c in same_mode(result["comparisons"]).values():
        fixed = ", ".join(f"{c[name]} {AXES[name]}" for name in AXES if name != axis)
        if c["row"] != BASELINE:
            lines.setdefault((c["row"], f"{c['mode']}, {fixed}"), []).append(c)
    lines = {key: sorted(cs, key=lambda c: c[axis]) for key, cs in lines.items() if len({c[axis] for c in cs}) > 1}
    if not lines:
        return None
    figure, axes = _figure(3.2 + 0.2 * len(lines))
    for style, (key, found) in zip(styles(list(lines)), lines.items(), strict=True):
        ratio, low, high = ([c[name] for c in found] for name in ("ratio", "low", "high"))
        errors = [
            [max(0.0, r - x) for r, x in zip(ratio, low, strict=True)],
            [max(0.0, x - r) for r, x in zip(ratio, high, strict=True)],
        ]
        axes.errorbar([c[axis] for c in found], ratio, errors, label=" ".join(key), capsize=3, **style)
    _log_axis(axes, {c[axis] for found in lines.values() for c in found}, AXES[axis], "speed-up over LLaVA-1.5")
    return _png(figure, 1)


def kernels(result: dict[str, Any]) -> bytes | None:
    """The chain's time over its floor, a line per provider and dtype."""
    lines: dict[tuple, list[tuple[int, float]]] = {}
    for row, own, _ in ratios(result["rows"]):
        if row["stage"] == "chain" and row["pass"] == "forward" and own:
            lines.setdefault((row["provider"], row["dtype"]), []).append((row["batch"], own / row["floor_us"]))
    if not lines:
        return None
    figure, axes = _figure(3.6)
    for style, (key, found) in zip(styles(list(lines)), lines.items(), strict=True):
        axes.plot(*zip(*sorted(found), strict=True), label=" ".join(key), **style)
    _log_axis(axes, {batch for found in lines.values() for batch, _ in found}, "batch", "projector: time over floor")
    return _png(figure, 3)


def _log_axis(axes: Any, values: set[int], name: str, what: str) -> None:
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    axes.minorticks_off()
    axes.set_xlabel(name, fontsize=8)
    axes.set_ylabel(what, fontsize=8)


SPEEDUP = "Speed-up over LLaVA-1.5 in the same mode against {}; bars are p10 to p90 of the rounds"
CHARTS: dict[str, dict[str, tuple[Chart, str]]] = {
    "prefill": {
        "stages": (stages, "Milliseconds to the first token: the median total, its stages and its speed-up"),
        "speedup": (speedup, SPEEDUP.format("batch")),
        "speedup-text": (partial(speedup, axis="text_tokens"), SPEEDUP.format("text tokens")),
        "speedup-images": (partial(speedup, axis="images"), SPEEDUP.format("images of a sequence")),
    },
    "kernels": {"kernels": (kernels, "The projector's time over its floor against batch; the line is the floor")},
}
