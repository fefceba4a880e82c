"""PNG charts of result files. matplotlib is imported here and nowhere else, when a chart is drawn."""

import importlib.util
import io
from typing import Any

from ..kernels.table import ratios
from ..prefill.speedup import label, place, same_mode

# One hue per stage, apart in lightness too: the charts are read printed in grey and by colour-blind eyes.
STAGES = {
    "vision_ms": ("vision tower", "#1b4f72"),
    "projector_ms": ("projector", "#e67e22"),
    "insert_ms": ("embedding, insertion", "#7f8c8d"),
    "prefill_ms": ("language model", "#5dade2"),
}
COLOURS = ("#1b4f72", "#e67e22", "#27ae60", "#8e44ad", "#7f8c8d", "#c0392b", "#17a2b8", "#b8860b")
AXES = {"batch": "batch", "text_tokens": "text tokens", "images": "images of a sequence"}
NO_MATPLOTLIB = "matplotlib is not installed, so there are no charts; install it with: pip install matplotlib"
Lines = dict[tuple[str, str], list[tuple[int, float, float, float]]]  # (what, how) -> x, y, low, high


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_all(result: dict[str, Any]) -> dict[str, tuple[bytes, str]]:
    """Name -> (PNG, what it shows), for every chart that the file has the data for."""
    drawn = {}
    if result["kind"] == "prefill":
        drawn["stages"] = stages(result), "Milliseconds to the first token: the median total, its stages, its speed-up"
        for axis, name in AXES.items():
            said = f"Speed-up over LLaVA-1.5 in the same mode against {name}; bars are p10 to p90 of the rounds"
            drawn[f"speedup-{axis}"] = curves(speedups(result, axis), name, "speed-up over LLaVA-1.5"), said
    if result["kind"] == "kernels":
        said = "The projector's time over its floor against batch; the line is the floor"
        drawn["kernels"] = curves(over_floor(result), "batch", "projector: time over floor"), said
    return {name: (png, said) for name, (png, said) in drawn.items() if png}


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


def stages(result: dict[str, Any]) -> bytes | None:
    """A bar per row, its stages stacked, the total and the speed-up behind it."""
    rows = [row for row in result["rows"] if row["total_ms"] is not None]
    if not rows:
        return None
    several = len({(place(row), row["mode"]) for row in rows}) > 1
    names = [label(row) + f"\n{row['mode']}, {place(row)}" * several for row in rows]
    found = [same_mode(result["comparisons"]).get((label(row), place(row), row["mode"])) for row in rows]
    figure, axes = _figure(1.0 + (0.42 if several else 0.36) * len(rows))
    axes.barh(names, [row["total_ms"] for row in rows], color="#d5dbdb", height=0.7)  # all that a compiled row has
    left = [0.0] * len(rows)
    for stage, (title, colour) in STAGES.items():
        widths = [row[stage] or 0.0 for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=title, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, (row, c) in enumerate(zip(rows, found, strict=True)):
        said = f"  {row['total_ms']:,.{0 if row['total_ms'] >= 100 else 1}f} ms" + (
            f"   {c['ratio']:.2f}x" if c else ""
        )
        axes.annotate(said, (row["total_ms"], index), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.28, y=0.5 / len(rows))
    axes.set_xlabel("milliseconds to the first token", fontsize=8)
    return _png(figure, 4)


def speedups(result: dict[str, Any], axis: str) -> Lines:
    """A line per row, mode and what else was fixed."""
    lines: Lines = {}
    for c in same_mode(result["comparisons"]).values():
        fixed = ", ".join(f"{c[name]} {AXES[name]}" for name in AXES if name != axis)
        lines.setdefault((c["row"], f"{c['mode']}, {fixed}"), []).append((c[axis], c["ratio"], c["low"], c["high"]))
    return lines


def over_floor(result: dict[str, Any]) -> Lines:
    lines: Lines = {}
    for row, own, _ in ratios(result["rows"]):
        if row["stage"] == "chain" and row["pass"] == "forward" and own:
            ratio = own / row["floor_us"]
            lines.setdefault((row["provider"], row["dtype"]), []).append((row["batch"], *[ratio] * 3))
    return lines


def styles(keys: list[tuple[str, str]]) -> list[dict[str, str]]:
    """(what, how) of every line -> a colour and a mark per what, dashes per how: no two lines alike."""
    what, how = (list(dict.fromkeys(part)) for part in zip(*keys, strict=True))
    at = [(what.index(w), how.index(h)) for w, h in keys]
    dashes = ("-", "--", ":", "-.")
    return [{"color": COLOURS[w % 8], "marker": "osD^vP"[(w + h) % 6], "linestyle": dashes[h % 4]} for w, h in at]


def curves(lines: Lines, xlabel: str, ylabel: str) -> bytes | None:
    """Where x took two values or more."""
    lines = {key: sorted(points) for key, points in lines.items() if len({point[0] for point in points}) > 1}
    if not lines:
        return None
    figure, axes = _figure(3.2 + 0.2 * len(lines))
    for style, (key, points) in zip(styles(list(lines)), lines.items(), strict=True):
        x, y, low, high = zip(*points, strict=True)
        errors = [[max(0.0, r - at) for r, at in zip(y, low, strict=True)]]
        errors += [[max(0.0, at - r) for r, at in zip(y, high, strict=True)]]
        axes.errorbar(x, y, errors, label=" ".join(key), capsize=3, **style)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    return _png(figure, 1)
