"""The chart of a prefill. matplotlib is imported here and nowhere else, when it is drawn."""

import io
from typing import Any

from ..prefill.speedup import label, place, same_mode

# One hue per stage, apart in lightness too: the charts are read printed in grey and by colour-blind eyes.
STAGES = {
    "vision_ms": ("vision tower", "#1b4f72"),
    "projector_ms": ("projector", "#e67e22"),
    "insert_ms": ("embedding, insertion", "#7f8c8d"),
    "prefill_ms": ("language model", "#5dade2"),
}
NO_MATPLOTLIB = "matplotlib is not installed, so there are no charts; install it with: pip install matplotlib"


def stages(result: dict[str, Any]) -> bytes | None:
    """A bar per row, its stages stacked, the total and the speed-up behind it."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["total_ms"] is not None]
    if not rows:
        return None
    several = len({(place(row), row["mode"]) for row in rows}) > 1
    names = [label(row) + f"\n{row['mode']}, {place(row)}" * several for row in rows]
    found = [same_mode(result["comparisons"]).get((label(row), place(row), row["mode"])) for row in rows]
    # Six inches wide: at the 400 pixels of a telephone its letters are still eight pixels high.
    figure = Figure(figsize=(6, 1.0 + (0.42 if several else 0.36) * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    totals = [row["total_ms"] if row["vision_ms"] is None else 0.0 for row in rows]  # all that a compiled row has
    axes.barh(names, totals, color="#d5dbdb", height=0.7)
    left = [0.0] * len(rows)
    for stage, (title, colour) in STAGES.items():
        widths = [row[stage] or 0.0 for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=title, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, (row, c) in enumerate(zip(rows, found, strict=True)):
        said = f"  {row['total_ms']:,.{0 if row['total_ms'] >= 100 else 1}f} ms" + (
            f"   {c['ratio']:.2f}x" if c else ""
        )
        axes.annotate(said, (row["total_ms"], index), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.28, y=0.5 / len(rows))
    axes.set_xlabel("milliseconds to the first token", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
