"""If this fails, the README quotes figures that its result file does not hold, or links to a file that is not there."""

import json
import re

import pytest
from support.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = {"mlp2x": "LLaVA-1.5", "reference": "LLaVA-STF, plain PyTorch", "fused": "LLaVA-STF, this library"}


def quoted(result):
    """The lines that the README's table must have for a prefill.json."""
    first = result["rows"][0]
    speedups = {name.split()[0].split("/")[1]: ratio for name, ratio in result["speedup"].items()}
    for row in result["rows"]:
        times = (row[stage] for stage in ("vision_ms", "projector_ms", "prefill_ms", "total_ms"))
        speedup = 1 if row is first else speedups[row["projector"]]
        figures = [str(row["image_tokens"]), *(f"{time:,.0f}" for time in times), f"{speedup:.2f}x"]
        yield f"| {NAMES[row['projector']]} | {' | '.join(figures)} |"


def test_the_table_is_the_file():
    """The commit and the versions too."""
    (file,) = set(re.findall(r"bench/results/[\w-]+/prefill\.json", README))
    result = json.loads((ROOT / file).read_text())
    for line in quoted(result):
        assert line in README
    assert f"commit {result['commit'][:7]}" in README
    assert f"torch {result['torch']}, transformers {result['transformers']}" in README.replace("\n", " ")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
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
