"""If this fails, the README quotes figures that its result file does not hold, or links to a file that is not there."""

import json
import math
import re

import pytest
from support.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {"llava-1.5/mlp2x": "LLaVA-1.5", "llava-stf/reference": "LLaVA-STF, plain PyTorch"}
NAMES |= {"llava-stf/fused": "LLaVA-STF, this library", "llava-next/mlp2x": "LLaVA-NeXT"}
NAMES |= {"llava-next-stf/fused": "LLaVA-NeXT, this library", "llava-onevision/mlp2x": "LLaVA-OneVision"}
NAMES |= {"llava-onevision-stf/fused": "LLaVA-OneVision, this library"}
MEASURED = ("kernels", "kernels-batches", "host")


def quoted(result):
    """The lines that the README's table must have for a prefill.json."""
    first = result["rows"][0]
    speedups = {name.split()[0]: ratio for name, ratio in result["speedup"].items()}
    for row in result["rows"]:
        times = (row[stage] for stage in ("vision_ms", "projector_ms", "prefill_ms", "total_ms"))
        label = f"{row['model']}/{row['projector']}"
        speedup = 1 if row is first else speedups[label]
        figures = [str(row["image_tokens"]), *(f"{time:,.0f}" for time in times), f"{speedup:.2f}x"]
        yield f"| {NAMES[label]} | {' | '.join(figures)} |"


def test_the_table_of_the_projector_is_its_file():
    result = json.loads((ROOT / "bench/results/amd-epyc-2-threads/host.json").read_text())
    for row in result["cpu"]:
        spread = f"{row['ratio']:.2f}x, {row['min']:.2f} to {row['max']:.2f}"
        what = row["what"].removeprefix("projector ")
        assert f"| {what} | {spread} | {row['reference_peak_mb']:.0f} | {row['peak_mb']:.0f} |" in README
    assert f"commit {result['commit'][:7]}" in README


def test_the_tables_of_the_gpu_are_their_files():
    folder = ROOT / "bench/results/nvidia-h200"
    result = json.loads((folder / "prefill.json").read_text())
    for label in ("llava-1.5/mlp2x", "llava-stf/reference", "llava-stf/fused"):
        said = [NAMES[label]]
        for row in result["rows"]:
            if (f"{row['model']}/{row['projector']}", row["mode"]) == (label, "graph"):
                where = {"row": label, "batch": row["batch"], "mode": "graph", "baseline_mode": "graph"}
                ratios = [one["ratio"] for one in result["comparisons"] if where.items() <= one.items()]
                said += [str(row["image_tokens"])] * (len(said) == 1)
                said += [f"{row['total_ms']:.1f}", f"{ratios[0] if ratios else 1:.2f}x"]
        assert f"| {' | '.join(said)} |" in README
    assert result["commit"][:7] in README


@pytest.mark.parametrize(("name", "folder"), [("H200", "nvidia-h200"), ("H100", "nvidia-h100-80gb-hbm3")])
def test_the_projectors_times_are_their_files(name, folder):
    files = [json.loads((ROOT / f"bench/results/{folder}/{file}.json").read_text()) for file in MEASURED]
    rows = [row for file in files[:2] for row in file["rows"] if row["stage"] == "chain"]
    batches = (1, 2, 4, 8, 16, 32, 64)
    for run, title in (("forward", f"{name}, forward"), ("forward+backward", f"{name}, training step")):
        times = {(row["provider"], row["batch"]): row["us"] for row in rows if row["pass"] == run}
        ratios = (f"{times['eager', batch] / times['stf', batch]:.2f}x" for batch in batches)
        assert f"| {title} | {' | '.join(ratios)} |" in README
        if run == "forward":
            rivals = {rival for rival, _ in times if not rival.startswith(("eager", "stf"))}
            best = [min(times.get((rival, batch), math.inf) for rival in rivals) for batch in batches]
            ratios = (f"{us / times['stf', batch]:.2f}x" for us, batch in zip(best, batches, strict=True))
            assert f"| {title}, best rival over ours | {' | '.join(ratios)} |" in README
    peaks = {(row["provider"], row["batch"]): row["peak_mb"] for row in rows if row["pass"] == "forward+backward"}
    said = README.replace("\n", " ")
    assert f"its peak is {peaks['stf', 8]:.0f} MB where plain PyTorch's is {peaks['eager', 8]:.0f} at batch 8" in said
    assert f"{peaks['stf', 64]:,.0f} and {peaks['eager', 64]:,.0f} at batch 64" in said
    [chain] = [row for row in files[2]["rows"] if row["what"] == "chain"]
    assert f"{chain['us']:.0f} against {chain['reference_us']:.0f}" in said
    assert all(file["commit"][:7] in README for file in files)


def test_the_study_is_its_file():
    result = json.loads((ROOT / "bench/results/quality/quality.json").read_text())
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    for row in result["rows"]:
        if row["seeds"] == 3:
            grades = (row["accuracy"][kind] for kind in ("detail", "coarse"))
            said = (f"{100 * grade['mean']:.1f} ± {100 * grade['std']:.1f}" for grade in grades)
            assert f"| {row['model']} | {row['start']} | {row['image_tokens']} | {' | '.join(said)} |" in page
    assert result["commit"][:7] in page


@pytest.mark.parametrize("name", ["prefill", "prefill-llava-next", "prefill-llava-onevision"])
def test_the_rows_are_their_files(name):
    """The commit too, the versions, and what is calculated of the families' cost."""
    result = json.loads((ROOT / f"bench/results/amd-epyc-2-threads/{name}.json").read_text())
    assert result["complete"]
    assert min(row["rounds"] for row in result["rows"]) >= 3
    for line in quoted(result):
        assert line in README
    costs = [re.findall(r"([\d.]+x)$", note)[0] for note in result["notes"] if note.startswith("calculated")]
    assert len(costs) == (name != "prefill")
    assert all(cost in README for cost in costs)
    assert result["commit"][:7] in README
    assert f"torch {result['torch']}, transformers {result['transformers']}" in README.replace("\n", " ")


def test_the_served_figures_are_the_file():
    (file,) = set(re.findall(r"bench/results/[\w-]+/serving\.json", README))
    result = json.loads((ROOT / file).read_text())
    stock, stf = (f"{row['ttft_ms']:,.0f} ms" for row in result["rows"])
    first, rate = (result["ratios"][name] for name in ("ttft_ms", "requests_per_s"))
    said = README.replace("\n", " ")
    assert f"first token after {stock} with LLaVA-1.5 and {stf} with LLaVA-STF" in said
    assert f"{first['ratio']:.2f}x sooner ({first['low']:.2f} to {first['high']:.2f} over four paired rounds)" in said
    assert f"{rate['ratio']:.2f}x the requests per second" in said


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [target for target in targets if "://" not in target and not (ROOT / target).exists()]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_files_that_are_named_exist(page):
    """`python -m a.b` and `folder/file.py`: a page that outlives a move sends its reader nowhere."""
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"python3? -m ((?:stf_kernels|llava_integration|bench)[\w.]*)", text))
    bases = [ROOT.joinpath(*module.rstrip(".").split(".")) for module in modules]
    assert not [base for base in bases if not base.with_suffix(".py").exists() and not (base / "__main__.py").exists()]
    folders = "stf_kernels|llava_integration|reference|bench|tests|examples|docs"
    paths = set(re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]*[\w/]", text))
    paths = {path for path in paths if not path.endswith("/tables/")}  # there once a device has been tuned
    assert not [path for path in paths if not (ROOT / path).exists()]
