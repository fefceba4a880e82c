"""One HTML page from result files: no script, no network, charts inside, readable printed and on a narrow screen.

It opens with the verdict and the chart; then the tables; what the rows are, versions and checks come last.
"""

import base64
from pathlib import Path
from typing import Any

import jinja2

from ..kernels import table as kernel_table
from ..prefill import table as prefill_table
from ..prefill.speedup import doubt, label, place, same_mode
from ..results import read
from ..stats import paired_ratio
from . import charts

WHERE = ["model", "mode", "at"]
TOTALS = ["image tokens", "total ms", "speed-up", "p10 to p90", *prefill_table.TIMES, "first"]


def write_report(files: list[Path], out: Path) -> tuple[Path, str | None]:
    """report.html and its charts -> (path of the page, what is missing from it)."""
    results = [read(file) for file in files]
    out.mkdir(parents=True, exist_ok=True)
    note, sections = None if charts.available() else charts.NO_MATPLOTLIB, []
    for index, (file, result) in enumerate(zip(files, results, strict=True)):
        # The folder is the device's name in most runs; the rest of the path is nobody's business but the machine's.
        name, image = "/".join(file.resolve().parts[-2:]) if len(files) > 1 else file.name, None
        if result["kind"] == "prefill" and not note and (png := charts.stages(result)):
            # Several runs: the second one's chart must not overwrite the first one's.
            (out / (f"stages-{index + 1}.png" if len(files) > 1 else "stages.png")).write_bytes(png)
            image = base64.b64encode(png).decode()
        shown = {"prefill": prefill, "kernels": kernels, "tests": tests}[result["kind"]](result)
        sections.append({"name": name, "result": result, "image": image, **shown})
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("page.html.j2").render(sections=sections, note=note)
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path, note


def headline(result: dict[str, Any]) -> list[str]:
    """The verdict: how much sooner the first token comes, and what of it is the operators'."""
    rows = {(label(row), place(row), row["mode"]): row for row in result["rows"] if row["total_ms"] is not None}
    found = [c for c in same_mode(result["comparisons"]).values() if c["row"].startswith("llava-stf/fused")]
    if not found:
        return ["No speed-up of LLaVA-STF over LLaVA-1.5 was measured"]
    # The first size that was measured, in the last mode (eager comes first).
    c = [c for c in found if place(c) == place(found[0]) and c["mode"] == found[-1]["mode"]][-1]
    where = place(c), c["mode"]
    ours, theirs = rows[(c["row"], *where)], rows[(c["baseline"], *where)]
    how = f"{c['ratio']:.2f}x sooner" if c["ratio"] >= 1 else f"LATER, at {c['ratio']:.2f}x the speed,"
    said = [
        f"LLaVA-STF gives its first token {how} than LLaVA-1.5",
        f"{ours['total_ms']:,.1f} ms instead of {theirs['total_ms']:,.1f}, with {ours['image_tokens']} image tokens "
        f"instead of {theirs['image_tokens']}: {result['preset']} on {result['device']}, {c['mode']}, {place(c)}.",
    ]
    if why := doubt(c):
        said.append(f"This speed-up may be noise: {why}.")
    pair = [rows.get((name, *where)) for name in ("llava-stf/reference", "llava-stf/fused")]
    if all(pair):
        samples = [row["samples"]["total_ms"] for row in pair]
        ratio = paired_ratio(*(values[: min(map(len, samples))] for values in samples))
        said.append(
            f"Of this the fused operators are {ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}], against "
            "the same model with plain PyTorch ones; the rest comes from fewer tokens."
        )
    return said


def prefill(result: dict[str, Any]) -> dict[str, Any]:
    rows, shown = result["rows"], prefill_table.cells(result)
    own = [i for i, row in enumerate(rows) if row["projector"] == "fused"]
    new = [i for i in range(1, len(rows)) if [shown[i][c] for c in WHERE[1:]] != [shown[i - 1][c] for c in WHERE[1:]]]
    more = [column for column in next(iter(shown), {}) if column not in (*WHERE, *TOTALS)]
    title, *verdict = headline(result)
    checks = [[prefill_table.sentence(check)] for check in result["checks"]]
    tables = [
        table(name, heading, [*WHERE, *columns], shown, text=3, own=own, new=new)
        for name, heading, columns in (
            ("totals", "To the first token, milliseconds", TOTALS),
            ("details", "Noise, memory and floors", more),
        )
    ]
    return {"title": title, "verdict": verdict, "tables": tables, "checks": checks, "labels": [*map(label, rows)]}


def kernels(result: dict[str, Any]) -> dict[str, Any]:
    shown = kernel_table.cells(result["rows"])
    own = [i for i, row in enumerate(shown) if row["provider"] == "stf"]
    grid = table("kernels", "Every product, cold L2", list(next(iter(shown), {})), shown, text=4, own=own)
    return {"title": "The projector's kernels", "verdict": kernel_table.standing(result["rows"]), "tables": [grid]}


def tests(result: dict[str, Any]) -> dict[str, Any]:
    counts = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped."
    return {"title": "Tests on the device", "verdict": [counts, *result["failures"]], "tables": []}


def table(name: str, title: str, header: list[str], rows: list[dict[str, str]], **marks: Any) -> dict[str, Any]:
    """text: how many columns stand left; own: rows of this library; new: rows above which a line is drawn."""
    lines = [[row.get(column, "-") for column in header] for row in rows]
    return {"name": name, "title": title, "header": header, "rows": lines, "new": [], **marks}
