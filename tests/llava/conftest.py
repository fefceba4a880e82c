"""A stock LLaVA, an LLaVA-STF of its sizes and a processor; tests that choose their own sizes take them from build."""

import pytest
from transformers import CLIPImageProcessorPil

import llava_integration as li
from tests.llava import build


@pytest.fixture
def stock():
    return build.stock()


@pytest.fixture
def stf():
    return build.stf()


@pytest.fixture
def processor():
    images = CLIPImageProcessorPil(**build.square())
    template = "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    template += "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
    tokenizer = build.tokenizer(padding_side="left")
    return li.LlavaStfProcessor(images, tokenizer, patch_size=build.PATCH, chat_template=template)
