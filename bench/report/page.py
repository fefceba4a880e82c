"""One HTML page from result files: no script, no network, the chart inside, readable printed and on a narrow screen.

How it looks, in what order, and which columns it has is in page.html.j2.
"""

import base64
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from .. import serving
from ..kernels import table as kernels
from ..prefill import table as prefill
from ..prefill.table import doubt, label, place, same_mode
from ..quality import __main__ as quality
from ..results import read
from ..stats import paired_ratio

# One hue per stage, apart in lightness too: the charts are read printed in grey and by colour-blind eyes.
STAGES = {
    "vision_ms": ("vision tower", "#1b4f72"),
    "projector_ms": ("projector", "#e67e22"),
    "insert_ms": ("embedding, insertion", "#7f8c8d"),
    "prefill_ms": ("language model", "#5dade2"),
}
NO_MATPLOTLIB = "matplotlib is not installed, so there are no charts; install it with: pip install matplotlib"


def write_report(files: list[Path], out: Path) -> tuple[Path, str | None]:
    """report.html and its charts -> (path of the page, what is missing from it)."""
    results, several = [read(file) for file in files], len(files) > 1
    out.mkdir(parents=True, exist_ok=True)
    note, sections = None if find_spec("matplotlib") else NO_MATPLOTLIB, []
    for index, (file, result) in enumerate(zip(files, results, strict=True), start=1):
        title, verdict, rows = shown(result)
        section = {"result": result, "title": title, "verdict": verdict, "rows": rows, "image": None}
        # The folder is the device's name in most runs; the rest of the path is nobody's business but the machine's.
        sections.append(section | {"name": "/".join(file.resolve().parts[-2:]) if several else file.name})
        if result["kind"] == "prefill" and not note and (png := chart(result)):
            (out / (f"stages-{index}.png" if several else "stages.png")).write_bytes(png)
            sections[-1]["image"] = base64.b64encode(png).decode()
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("page.html.j2").render(sections=sections, note=note, sentence=prefill.sentence)
    (out / "report.html").write_text(text, encoding="utf-8")
    return out / "report.html", note


def shown(result: dict[str, Any]) -> tuple[str, list[str], list[dict[str, str]]]:
    """The title, the sentences under it, and the rows as text."""
    rows = result.get("rows", [])
    if result["kind"] == "prefill":
        title, *verdict = headline(result)
        return title, verdict, prefill.cells(result)
    if result["kind"] == "kernels":
        return "The projector's kernels", kernels.standing(rows), kernels.cells(rows)
    if result["kind"] == "host":
        cells = [{name: v if name == "what" else f"{v:.2f}" for name, v in row.items()} for row in rows]
        return "Host time of an eager call", [], cells
    if result["kind"] == "quality":
        return "Answers with fewer vision tokens, % right", [], quality.cells(rows)
    if result["kind"] == "serving":
        return "Served by vLLM", serving.sentences(result), serving.cells(result)
    counts = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped."
    return "Tests on the device", [counts, *result["failures"]], []


def headline(result: dict[str, Any]) -> list[str]:
    """The verdict: how much sooner the first token comes, and what of it is the operators'."""
    rows = {(label(row), place(row), row["mode"]): row for row in result["rows"] if row["total_ms"] is not None}
    found = [c for c in same_mode(result["comparisons"]).values() if c["row"] == "llava-stf/fused"]
    if not found:
        return ["No speed-up of LLaVA-STF over LLaVA-1.5 was measured"]
    # The first size that was measured, in the last mode: eager comes first.
    c = [c for c in found if place(c) == place(found[0])][-1]
    ours, theirs, plain = (
        rows.get((name, place(c), c["mode"])) for name in (c["row"], c["baseline"], "llava-stf/reference")
    )
    how = f"{c['ratio']:.2f}x sooner" if c["ratio"] >= 1 else f"LATER, at {c['ratio']:.2f}x the speed,"
    noise = f"No difference beyond noise between LLaVA-STF and LLaVA-1.5 ({c['ratio']:.2f}x)"
    said = [
        noise if c["beyond_noise"] is False else f"LLaVA-STF gives its first token {how} than LLaVA-1.5",
        f"{ours['total_ms']:,.1f} ms instead of {theirs['total_ms']:,.1f}, with {ours['image_tokens']} image tokens "
        f"instead of {theirs['image_tokens']}: {result['preset']} on {result['device']}, {c['mode']}, {place(c)}.",
    ]
    said += [f"This speed-up may be noise: {why}."] if (why := doubt(c)) else []
    if plain:
        samples = [row["samples"]["total_ms"] for row in (plain, ours)]
        ratio = paired_ratio(*(values[: min(map(len, samples))] for values in samples))
        spread = f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        said.append(f"Fused against plain PyTorch operators in the same model: {spread}. The rest is fewer tokens.")
    return said


def chart(result: dict[str, Any]) -> bytes | None:
    """A bar per row, its stages stacked, the total and the speed-up behind it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in result["rows"] if row["total_ms"] is not None]
    if not rows:
        return None
    several, speedups = len({(place(row), row["mode"]) for row in rows}) > 1, same_mode(result["comparisons"])
    # Six inches wide: at the 400 pixels of a telephone its letters are still eight pixels high.
    figure = Figure(figsize=(6, 1.0 + (0.42 if several else 0.36) * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    for row in rows:
        name, left, total = label(row) + f"\n{row['mode']}, {place(row)}" * several, 0.0, row["total_ms"]
        if row["vision_ms"] is None:
            axes.barh(name, total, color="#d5dbdb", height=0.7)  # all that a compiled row has
        for stage, (_, colour) in STAGES.items():
            axes.barh(name, row[stage] or 0.0, left=left, color=colour, height=0.7)
            left += row[stage] or 0.0
        speedup = speedups.get((label(row), place(row), row["mode"]))
        said = f"  {total:,.{0 if total >= 100 else 1}f} ms" + (f"   {speedup['ratio']:.2f}x" if speedup else "")
        axes.annotate(said, (total, name), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.28, y=0.5 / len(rows))
    axes.set_xlabel("milliseconds to the first token", fontsize=9)
    patches = [Patch(color=colour, label=title) for title, colour in STAGES.values()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
