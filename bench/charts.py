"""PNG charts of result files. matplotlib is imported here and nowhere else, when a chart is drawn.

stages   one bar per row, its stages stacked                 (prefill)
speedup  speed-up over LLaVA-1.5 against batch, text, images (prefill, where two or more were measured)
floor    measured over floor, per stage or per kernel        (prefill and kernels)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
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
LINES = ("#1b4f72", "#e67e22", "#27ae60", "#8e44ad", "#7f8c8d", "#c0392b", "#17a2b8", "#b8860b")
MARKS = "osD^vP"
DASHES = ("-", "--", ":", "-.")
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


def _figure(height: float) -> tuple[Any, Any, Callable[[], bytes]]:
    """Six inches wide: at the 400 pixels of a telephone its letters are still eight pixels high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)

    def png() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200)
        return buffer.getvalue()

    return figure, axes, png


def _styles(keys: list[tuple[Any, Any]]) -> list[dict[str, str]]:
    """(what, how) of every line -> a colour and a mark per what, dashes per how: no two lines alike."""
    what, how = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    return [
        {
            "color": LINES[what.index(w) % len(LINES)],
            "marker": MARKS[(what.index(w) + how.index(h)) % len(MARKS)],
            "linestyle": DASHES[how.index(h) % len(DASHES)],
        }
        for w, h in keys
    ]


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Of the bars, unique: bars of one name would be drawn on top of each other."""
    said = [name for name in ("batch", "text_tokens", "images") if len({row.get(name, 1) for row in rows}) > 1]
    short = {"batch": "batch {}", "text_tokens": "text {}", "images": "images {}"}
    return [
        ", ".join([f"{label(row)} {row['mode']}", *(short[name].format(row.get(name, 1)) for name in said)])
        for row in rows
    ]


def stages(result: dict[str, Any]) -> bytes | None:
    rows = [row for row in result["rows"] if row["total_ms"] is not None and row["vision_ms"] is not None]
    if not rows:
        return None
    figure, axes, png = _figure(1.2 + 0.3 * len(rows))
    names = _names(rows)
    left = [0.0] * len(rows)
    for stage, (title, colour) in STAGE_COLOURS.items():
        widths = [row[stage] or 0.0 for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=title, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, row in enumerate(rows):
        axes.annotate(f" {row['total_ms']:.1f}", (left[index], index), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.5 / len(rows))
    axes.set_xlabel("ms to the first token")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return png()


_AXES = {"batch": "batch", "text_tokens": "text tokens", "images": "images of a sequence"}


def speedup(result: dict[str, Any], axis: str = "batch") -> bytes | None:
    """A line per row, mode and what else was fixed, where `axis` took two values or more."""
    rows = [{"images": 1, **c} for c in result["comparisons"] if c["mode"] == c["baseline_mode"]]
    fixed = [name for name in _AXES if name != axis]
    lines: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["row"], row["mode"], *(row[name] for name in fixed)), []).append(row)
    lines = {key: points for key, points in sorted(lines.items()) if len({p[axis] for p in points}) > 1}
    if not lines:
        return None
    # What never varies is not said at every line.
    told = [i for i, name in enumerate(fixed) if len({key[2 + i] for key in lines}) > 1]
    figure, axes, png = _figure(3.2 + 0.2 * (len(lines) // 2))
    styles = _styles([(key[0], key[1:]) for key in lines])
    for index, (style, (key, points)) in enumerate(zip(styles, lines.items(), strict=True)):
        points = sorted(points, key=lambda p: p[axis])
        ratio = [p["ratio"] for p in points]
        errors = [[max(0.0, p["ratio"] - p["low"]) for p in points], [max(0.0, p["high"] - p["ratio"]) for p in points]]
        shift = 1 + 0.02 * (index - (len(lines) - 1) / 2)  # bars beside each other, not on top
        name = " ".join([key[0], key[1], *(f"{key[2 + i]} {_AXES[fixed[i]]}" for i in told)])
        axes.errorbar([p[axis] * shift for p in points], ratio, errors, label=name, capsize=3,
                      **style)  # fmt: skip
    ticks = sorted({p[axis] for points in lines.values() for p in points})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel("speed-up, same mode")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return png()


def prefill_floor(result: dict[str, Any]) -> bytes | None:
    rows = [row for row in result["rows"] if row["vision_ms"] is not None]
    if not rows:
        return None
    shown = ("vision_ms", "projector_ms", "prefill_ms")
    figure, axes, png = _figure(1.2 + 0.4 * len(rows))
    height = 0.8 / len(shown)
    for offset, stage in enumerate(shown):
        title, colour = STAGE_COLOURS[stage]
        at = [index + (offset - 1) * height for index in range(len(rows))]
        axes.barh(at, [row["floor_ratio"].get(stage) or 0.0 for row in rows], height=height, color=colour, label=title)
    names = _names(rows)
    axes.margins(y=0.5 / len(rows))
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("measured over floor (line: 1)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return png()


def kernel_floor(result: dict[str, Any]) -> bytes | None:
    rows = [row for row in result["rows"] if row["stage"] == "chain" and row.get("pass", "forward") == "forward"]
    rows = [row for row in rows if row["us"] or row["us_eager"]]
    if not rows:
        return None
    figure, axes, png = _figure(3.6)
    keys = sorted({(row["provider"], row["dtype"]) for row in rows})
    for style, key in zip(_styles(keys), keys, strict=True):
        points = sorted(
            (r["batch"], (r["us"] or r["us_eager"]) / r["floor_us"]) for r in rows if (r["provider"], r["dtype"]) == key
        )
        axes.plot(*zip(*points, strict=True), label=" ".join(key), **style)
    batches = sorted({row["batch"] for row in rows})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("projector: measured over floor")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return png()


_CHARTS: dict[str, dict[str, Callable[[dict[str, Any]], bytes | None]]] = {
    "prefill": {
        "stages": stages,
        "speedup": speedup,
        "speedup-text": partial(speedup, axis="text_tokens"),
        "speedup-images": partial(speedup, axis="images"),
        "floor": prefill_floor,
    },
    "kernels": {"kernels": kernel_floor},
    "tests": {},
}
