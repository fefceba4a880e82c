"""PNG charts of result files. matplotlib is imported here and nowhere else, when a chart is drawn.

stages   one bar per row, its stages stacked                 (prefill)
speedup  speed-up over LLaVA-1.5 against batch               (prefill, two batches or more)
floor    measured over floor, per stage or per kernel        (prefill and kernels)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from .speedup import label

# One hue per stage, apart in lightness too: the charts are read printed in grey and by colour-blind eyes.
STAGE_COLOURS = {
    "vision_ms": ("vision tower", "#1b4f72"),
    "projector_ms": ("projector", "#e67e22"),
    "insert_ms": ("embedding, insertion", "#7f8c8d"),
    "prefill_ms": ("language model", "#5dade2"),
    "first_token_ms": ("first token", "#2c3e50"),
}
LINES = ("#1b4f72", "#e67e22", "#27ae60", "#8e44ad", "#7f8c8d", "#c0392b")
MARKS = "osD^vP"
NO_MATPLOTLIB = "matplotlib is not installed, so there are no charts; install it with: pip install matplotlib"


def available() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def draw_all(result: dict[str, Any]) -> dict[str, bytes]:
    """Name -> PNG, for every chart that the file has the data for."""
    drawn = {}
    for name, draw in _CHARTS[result["kind"]].items():
        png = draw(result)
        if png is not None:
            drawn[name] = png
    return drawn


def _figure(width: float, height: float) -> tuple[Any, Any, Callable[[], bytes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)

    def png() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()

    return figure, axes, png


def stages(result: dict[str, Any]) -> bytes | None:
    rows = [row for row in result["rows"] if row["total_ms"] is not None and row["vision_ms"] is not None]
    if not rows:
        return None
    figure, axes, png = _figure(9, 1.4 + 0.42 * len(rows))
    names = [f"{label(row)}  {row['mode']}  b{row['batch']}  t{row['text_tokens']}" for row in rows]
    left = [0.0] * len(rows)
    for stage, (title, colour) in STAGE_COLOURS.items():
        widths = [row[stage] or 0.0 for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=title, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, row in enumerate(rows):
        axes.annotate(f" {row['total_ms']:.1f}", (left[index], index), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms to the first token")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return png()


def speedup(result: dict[str, Any]) -> bytes | None:
    same = [c for c in result["comparisons"] if c["mode"] == c["baseline_mode"]]
    if len({c["batch"] for c in same}) < 2:
        return None
    figure, axes, png = _figure(7, 4)
    keys = sorted({(c["row"], c["mode"], c["text_tokens"]) for c in same})
    for index, key in enumerate(keys):
        own = [c for c in same if (c["row"], c["mode"], c["text_tokens"]) == key]
        points = sorted((c["batch"], c["ratio"], c["low"], c["high"]) for c in own)
        batch, ratio, low, high = zip(*points, strict=True)
        errors = [
            [max(0.0, r - x) for r, x in zip(ratio, low, strict=True)],
            [max(0.0, x - r) for r, x in zip(ratio, high, strict=True)],
        ]
        axes.errorbar(batch, ratio, errors, label=f"{key[0]} {key[1]}, {key[2]} text", capsize=3,
                      color=LINES[index % len(LINES)], marker=MARKS[index % len(MARKS)])  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({c["batch"] for c in same}), [str(b) for b in sorted({c["batch"] for c in same})])
    axes.set_xlabel("batch")
    axes.set_ylabel("times faster than LLaVA-1.5, same mode")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return png()


def prefill_floor(result: dict[str, Any]) -> bytes | None:
    rows = [row for row in result["rows"] if row["vision_ms"] is not None]
    if not rows:
        return None
    shown = ("vision_ms", "projector_ms", "prefill_ms")
    figure, axes, png = _figure(9, 1.6 + 0.6 * len(rows))
    height = 0.8 / len(shown)
    for offset, stage in enumerate(shown):
        title, colour = STAGE_COLOURS[stage]
        at = [index + (offset - 1) * height for index in range(len(rows))]
        axes.barh(at, [row["floor_ratio"][stage] for row in rows], height=height, color=colour, label=title)
    names = [f"{label(row)}  {row['mode']}  b{row['batch']}  t{row['text_tokens']}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("measured over floor")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return png()


def kernel_floor(result: dict[str, Any]) -> bytes | None:
    rows = [row for row in result["rows"] if row["stage"] == "chain" and row.get("pass", "forward") == "forward"]
    rows = [row for row in rows if row["us"] or row["us_eager"]]
    if not rows:
        return None
    figure, axes, png = _figure(7, 4)
    for index, key in enumerate(sorted({(row["provider"], row["dtype"]) for row in rows})):
        points = sorted(
            (r["batch"], (r["us"] or r["us_eager"]) / r["floor_us"]) for r in rows if (r["provider"], r["dtype"]) == key
        )
        axes.plot(*zip(*points, strict=True), label=" ".join(key), color=LINES[index % len(LINES)],
                  marker=MARKS[index % len(MARKS)])  # fmt: skip
    batches = sorted({row["batch"] for row in rows})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("projector: measured over floor")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return png()


_CHARTS: dict[str, dict[str, Callable[[dict[str, Any]], bytes | None]]] = {
    "prefill": {"stages": stages, "speedup": speedup, "floor": prefill_floor},
    "kernels": {"kernels": kernel_floor},
    "tests": {},
}
