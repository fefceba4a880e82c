"""If this fails, a new family of models takes more than one file, or CONTRIBUTING shows one that is not there."""

import importlib.util
import re

import torch
from support.processes import ROOT
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

import llava_integration as li
from llava_integration.core import register
from tests.llava import build, tiled

FILES = sorted((ROOT / "llava_integration").glob("*_stf.py"))
NEXT = ROOT / "llava_integration" / "llava_next_stf.py"


def test_a_family_is_one_short_file():
    assert len(FILES) == 3
    for file in FILES:
        assert len(file.read_text().splitlines()) < 150
    names = re.compile("LlavaNextStf|LlavaOnevisionStf|llava_next_stf|llava_onevision_stf")
    others = set((ROOT / "llava_integration").rglob("*.py")) - {*FILES, ROOT / "llava_integration" / "__init__.py"}
    assert not [file for file in others if names.search(file.read_text())]


def test_contributing_shows_the_file():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    shown = page[page.index("@strict\n") :].split("```")[0]
    ours = re.sub(
        r'\n    """.*?"""\n(\n(?=    ))?', "\n", NEXT.read_text()[NEXT.read_text().index("@strict") :], flags=re.S
    )
    assert shown.replace("    ...\n", "").split() == ours.split()


def test_the_next_one_takes_a_file_and_nothing_else(tmp_path, monkeypatch):
    """LLaVA-NeXT-Video by the names of LLaVA-NeXT's file: its images, exactly."""
    monkeypatch.setattr(register, "_FAMILIES", dict(register._FAMILIES))  # known for this test alone
    source = NEXT.read_text().replace("LlavaNext", "LlavaNextVideo").replace("llava_next", "llava_next_video")
    (tmp_path / "llava_next_video_stf.py").write_text(source.replace("from .", "from llava_integration."))
    spec = importlib.util.spec_from_file_location("llava_next_video_stf", tmp_path / "llava_next_video_stf.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    torch.manual_seed(0)
    grids = tiled.next_model().config.image_grid_pinpoints
    config = LlavaNextVideoConfig(**build.options(image_grid_pinpoints=grids, video_token_index=5))
    stock = build.randomize(LlavaNextVideoForConditionalGeneration(config).double())
    made = tiled.inputs(stock, tiled.SIZES)
    with torch.no_grad():
        features = li.from_llava(stock).get_image_features(**made).pooler_output
    for ours, expected in zip(features, tiled.expected(stock, made, tiled.SIZES, 2), strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)
