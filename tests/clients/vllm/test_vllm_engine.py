"""If this fails, vLLM does not answer from LLaVA-STF folders as transformers does, or runs another projector."""

import contextlib
import functools
import logging
import os
import re

import numpy as np
import pytest
import vllm
from clients.vllm import folders
from support.processes import ROOT

import llava_integration.vllm as plugin
from examples.vllm_server import SETTINGS
from stf_kernels import CompactTokenProjector
from tests.llava import build

SMALL = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
SMALL |= {"max_num_batched_tokens": 256, "limit_mm_per_prompt": {"image": 2}, "disable_log_stats": True}


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def engine(folder, **options):
    """Its worker processes end with the block."""
    llm = vllm.LLM(str(folder), **SMALL | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def answers(llm, prompts=folders.PROMPTS):
    prompts = [{"prompt": text} | ({"multi_modal_data": data(text, seeds)} if seeds else {}) for text, seeds in prompts]
    options = {"temperature": 0, "max_tokens": folders.NEW_TOKENS, "ignore_eos": True}
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, vllm.SamplingParams(**options), use_tqdm=False)]


def data(text, seeds):
    images = folders.images(seeds)
    return {"video": np.stack(images)} if "<video>" in text else {"image": images}


def fused(model):
    """In vLLM's worker: its own linear layers would send the projector back to plain matrix products."""
    projector = model.multi_modal_projector
    linears = [layer for part in (projector.mbtf, projector.stf) for layer in (part.linear_1, part.linear_2)]
    return type(projector).__qualname__, *(type(layer).__module__ for layer in linears)


@pytest.mark.parametrize("kind", ["siglip", "llava", "next", "onevision"])
def test_greedy_tokens(tmp_path, monkeypatch, kind):
    """One image, two, none, and a video. "siglip" has the tensor names of 2023, the others are converted."""
    folder = folders.make(tmp_path, "siglip", "oldest") if kind == "siglip" else folders.converted(tmp_path, kind)
    prompts = folders.PROMPTS + [folders.VIDEO] * (kind == "onevision")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # apply_model sends a function
    with engine(folder, max_model_len=256) as llm:
        assert answers(llm, prompts) == folders.expected(folder, prompts)
        assert llm.apply_model(fused) == [(CompactTokenProjector.__qualname__, *["torch.nn.modules.linear"] * 4)]


@pytest.mark.parametrize("family", ["llava", "next", "onevision"])
def test_an_auto_map_folder_by_the_transformers_backend(tmp_path, family):
    """Where this package is not installed."""
    folder = folders.converted(tmp_path, family, auto_map=True)
    with engine(folder, model_impl="transformers", trust_remote_code=True, max_model_len=256) as llm:
        assert answers(llm) == folders.expected(folder)


def test_tensor_parallel(tmp_path, monkeypatch):
    """The projector is whole on both ranks."""
    folder, cores = folders.make(tmp_path), sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    with engine(folder, tensor_parallel_size=2) as llm:
        assert answers(llm) == folders.expected(folder)


def test_no_image_allowed(tmp_path):
    """vLLM then leaves the tower and the projector out."""
    folder = folders.make(tmp_path)
    with engine(folder, limit_mm_per_prompt={"image": 0}) as llm:
        assert answers(llm, folders.PROMPTS[2:]) == folders.expected(folder)[2:]


def test_the_three_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^\*\*vLLM\*\*.*?^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(list(filter(None, code.splitlines()))) == 3
    folders.make(tmp_path / "llava-stf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, **SMALL))  # or it compiles for a minute
    exec(code, {"image": build.image()})
    assert set(capsys.readouterr().out.split()) & set(build.WORDS)


def test_names_between():
    """transformers 4.52 to 5.x: model.vision_tower.vision_model.*"""
    from llava_integration.vllm.model import LlavaStfForConditionalGeneration as LlavaStf

    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert {LlavaStf.hf_to_vllm_mapper.map_name(before + name) for before in ("", "model.")} == {name}
    assert LlavaStf.hf_to_vllm_mapper.map_name("model.vision_tower.embeddings.class_embedding") == (
        "vision_tower.vision_model.embeddings.class_embedding"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"__version__": "0.99.1"}, "may not work; .* tested with vLLM 0.32, this is 0.99.1: pip install"),
        ({"ModelRegistry": object()}, "cannot be served .* tested with vLLM 0.32"),
    ],
)
def test_what_registering_says(monkeypatch, changed, said):
    """Every vLLM process of the machine calls it, for other models too: of another version it warns and goes on."""
    warnings, logger = [], logging.getLogger("vllm.plugins.llava_stf")
    monkeypatch.setattr(logger, "warning", lambda text, *args: warnings.append(text % args))
    for name, value in changed.items():
        monkeypatch.setattr(vllm, name, value)
    plugin.register()
    assert len(warnings) == (said is not None)
    assert not warnings or re.search(said, warnings[0])
