"""Nothing is downloaded. Each file needs an environment of its own, which `make test-kernels` and its like make."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # tiny_llava.py
TEMPLATE = "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
TEMPLATE += "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}ASSISTANT:{% endif %}"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """In this process and those that it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def folder(tmp_path):
    """A tiny random LLaVA-STF with its processor, as from_pretrained reads it."""
    from tiny_llava import make_model, make_processor

    import llava_integration as li

    model = li.from_llava(make_model())
    model.lm_head.weight.data[:5] = 0  # words, no special tokens
    model.save_pretrained(tmp_path / "model")
    processor = li.LlavaStfProcessor.from_llava(make_processor())
    processor.chat_template = TEMPLATE
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
