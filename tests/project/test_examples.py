"""If this fails, a newcomer's first paste does not run: an example, or a Python snippet of the README or of docs/."""

import importlib.util
import re

import pytest
from support.processes import ROOT, python

pytest.importorskip("transformers")

# A module of the others; what tests/clients and tests/learn run.
NOT_HERE = ("tiny_llava.py", "trl_lora.py", "vllm_server.py", "real_questions.py")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name not in NOT_HERE)
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# What the README leaves to its reader, tiny and random here: a checkpoint, an image, batches.
CHECKPOINT = """
from tiny_llava import *
path = "llava"
make_model().save_pretrained(path)
make_processor().save_pretrained(path)
"""
IMAGE = "import torch\nfrom tiny_llava import make_image\nimage = make_image()\n"
BATCHES = "batches = [{**inputs, 'labels': inputs['input_ids']}]\n"


def snippets(page):
    """Not those of "Use it with", which tests/clients run where the client is."""
    text = re.sub(r"^## Use it with\n.*?^## ", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(code, folder):
    """`code` as a program of its own in `folder`."""
    result = python("-c", f"import os\nos.chdir({str(folder)!r})\n{code}", PYTHONPATH=f"{ROOT}:{ROOT}/examples")
    assert result.returncode == 0, f"{code}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name):
    """As its first lines say: from the checkout, on a CPU. Each checks its own results."""
    result = python(f"examples/{name}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout


def test_the_example_of_trl_says_what_to_install():
    if importlib.util.find_spec("trl"):
        pytest.skip("it is installed")
    result = python("examples/trl_lora.py")
    assert (result.returncode, result.stderr) == (1, "datasets is not installed: pip install trl peft datasets\n")


def test_a_clients_warning_names_the_version_that_its_tests_pin():
    from llava_integration import clients, vllm

    for client, version in (clients.TESTED | {"vllm": vllm.TESTED}).items():
        pins = (ROOT / ".ci" / f"{client}.txt").read_text()
        assert re.search(rf"^{client}(-cpu)?=={re.escape(version)}(\.\d+)?$", pins, re.MULTILINE), client


def test_the_readme_from_top_to_bottom(tmp_path):
    """Save in one process; load and train in another, as a reader would, without what the first imported."""
    assert len(EXAMPLES) >= 4
    save, load, train, operator = snippets(ROOT / "README.md")
    run(CHECKPOINT + save, tmp_path)
    assert "USER:" in run(IMAGE + load + BATCHES + train, tmp_path)
    run(operator + "assert y.shape == (2, 576, 4096)", tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_a_page(page, tmp_path):
    """Its snippets one after the other; each imports what it uses."""
    run("\n".join(snippets(page)), tmp_path)
