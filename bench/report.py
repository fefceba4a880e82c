"""Result files -> one page and its charts; or the difference between two runs, and whether it is more than noise.

    python -m bench.report FILE... [--out DIR]     report.html and PNG charts, beside the first FILE unless --out says
    python -m bench.report --compare A B           rows of two runs on one device: B over A, beyond their spread or not

A difference counts when the p10-p90 ranges of the two runs do not overlap, of rows and of speed-ups alike; with fewer
than four rounds that happens by chance too often to be told. Exit codes: 0, or 2 for a file that is not a result, is
cut short, or comes from another device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import charts, entry, page
from .results import ResultError, read
from .speedup import label, names_savings, where
from .stats import ENOUGH_ROUNDS, median, percentile
from .table import number, render


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A page from result files.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="prefill.json, kernels.json, tests.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: beside the first FILE")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two runs of the same kind")
    args = parser.parse_args(argv)
    if not args.files and not args.compare:
        parser.error("give result FILEs or --compare A B")
    said, note = [], None
    try:
        if args.compare:
            said.append(compare(*args.compare))
        if args.files:
            path, note = write_report(args.files, args.out or args.files[0].parent)
            said.append(str(path))
    except ResultError as error:
        print(f"python -m bench.report: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"python -m bench.report: error: --out: {error}", file=sys.stderr)
        return 2
    print("\n".join(said))
    if note:
        print(note, file=sys.stderr)
    return 0


def write_report(files: list[Path], out: Path) -> tuple[Path, str | None]:
    """report.html and its charts -> (path of the page, what is missing from it)."""
    results = [(file, read(file)) for file in files]
    out.mkdir(parents=True, exist_ok=True)
    note = None if charts.available() else charts.NO_MATPLOTLIB
    drawn = []
    for number_of_file, (_, result) in enumerate(results):
        pngs = {} if note else charts.draw_all(result)
        for name, png in pngs.items():
            # Several runs side by side: the second one's charts must not overwrite the first one's.
            suffix = f"-{number_of_file + 1}" if len(results) > 1 else ""
            (out / f"{name}{suffix}.png").write_bytes(png)
        drawn.append(pngs)
    path = out / "report.html"
    # The folder is the device's name in most runs; the rest of the path is nobody's business but the machine's.
    named = [("/".join(file.resolve().parts[-2:]) if len(files) > 1 else file.name, result) for file, result in results]
    path.write_text(page.render(named, drawn, note), encoding="utf-8")
    return path, note


_KEYS = {
    "prefill": ("model", "projector", "mode", "batch", "text_tokens", "images"),
    "kernels": ("stage", "pass", "provider", "dtype", "batch"),
}


def compare(first: Path, second: Path) -> str:
    """The rows that both files have, B over A, and which differences exceed the runs' own spread."""
    a, b = read(first), read(second)
    if a["kind"] != b["kind"] or a["kind"] not in _KEYS:
        raise ResultError(f"--compare: expected two prefill or two kernels files, got {a['kind']!r} and {b['kind']!r}")
    for field in ("device", "dtype", "preset", "sizes"):
        if a.get(field) != b.get(field):
            raise ResultError(
                f"--compare: {field}: {a.get(field)!r} in {first}, {b.get(field)!r} in {second}; "
                "a ratio of the two would say nothing about the code"
            )
    keys = _KEYS[a["kind"]]
    notes = []
    if a["kind"] == "prefill" and names_savings(a) != names_savings(b):
        notes = ["", f"{first if names_savings(b) else second} is from before rows named their savings: both of its "
                 "LLaVA-STF rows had all of them, and are compared with none."]  # fmt: skip
        a, b = (_without_stf(result) for result in (a, b))
    other = {_name(row, keys): row for row in b["rows"]}
    lines = []
    for row in a["rows"]:
        name = _name(row, keys)
        before, after = _samples(row), _samples(other.get(name, {}))
        if before and after:
            lines.append((*(str(part) for part in name), *_difference(before, after)))
    if not lines:
        raise ResultError(f"--compare: {first} and {second} have no measured row in common")
    title = f"A {first} ({a['commit'][:12]})   B {second} ({b['commit'][:12]})   {a['device']}"
    unit = "ms" if a["kind"] == "prefill" else "us"
    header = (*keys, f"A {unit}", f"B {unit}", "B / A", "")
    return "\n".join([title, "", render(header, lines, left=len(keys)), *_speedups(a, b), *notes])


def _without_stf(result: dict[str, Any]) -> dict[str, Any]:
    rows = [row for row in result["rows"] if row["model"] != "llava-stf"]
    return {**result, "rows": rows, "comparisons": [
        c for c in result.get("comparisons", []) if not c["row"].startswith("llava-stf/")]}  # fmt: skip


def _name(row: dict[str, Any], keys: Sequence[str]) -> tuple:
    defaults = {"images": 1, "pass": "forward"}  # of files from before these were fields
    if "projector" in keys:
        row = {**row, "projector": label(row).removeprefix(f"{row['model']}/")}
    return tuple(row.get(key, defaults.get(key)) for key in keys)


def _speedups(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Ratios within a round do not feel a machine that was busier in one run: theirs is the stricter comparison."""
    keys = ("row", "mode", "baseline_mode", "batch", "text_tokens", "images")
    other = {_name(c, keys): c for c in b.get("comparisons", [])}
    lines = []
    for first in a.get("comparisons", []):
        name = _name(first, keys)
        second = other.get(name)
        if second is None:
            continue
        apart = first["high"] < second["low"] or second["high"] < first["low"]
        enough = min(_rounds(a, first), _rounds(b, second)) >= ENOUGH_ROUNDS
        shown = [f"{c['ratio']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in (first, second)]
        lines.append((*map(str, name), *shown, _verdict(enough, apart, "DIFFERS")))
    header = ("speed-up of", "mode", "over", "batch", "text_tokens", "images", "A", "B", "")
    return ["", render(header, lines, left=len(keys))] if lines else []


def _rounds(result: dict[str, Any], comparison: dict[str, Any]) -> int:
    """Of the row that a speed-up is about."""
    wanted = (comparison["row"], comparison["mode"], *where(comparison))
    counts = [len(_samples(row)) for row in result["rows"] if (label(row), row["mode"], *where(row)) == wanted]
    return min(counts, default=0)


def _verdict(enough: bool, apart: bool, otherwise: str) -> str:
    return "too few rounds" if not enough else otherwise if apart else "within noise"


def _samples(row: dict[str, Any]) -> list[float]:
    samples = row.get("samples", [])
    if isinstance(samples, dict):
        samples = samples.get("total_ms", [])
    return [value for value in samples if value is not None]


def _difference(before: list[float], after: list[float]) -> tuple[str, str, str, str]:
    apart = percentile(before, 0.9) < percentile(after, 0.1) or percentile(after, 0.9) < percentile(before, 0.1)
    enough = min(len(before), len(after)) >= ENOUGH_ROUNDS
    ratio = median(after) / median(before)
    verdict = _verdict(enough, apart, "faster" if ratio < 1 else "SLOWER")
    return number(median(before), 2), number(median(after), 2), f"{ratio:.3f}", verdict


if __name__ == "__main__":
    entry.run(main)
