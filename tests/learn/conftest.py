"""A LLaVA-1.5 and an LLaVA-STF of a few thousand parameters as folders, and a few questions on drawn images."""

import json

import pytest

import llava_integration as li
from examples.tiny_llava import make_processor
from tests.llava import build

ANSWERS = ["a cat", "a dog", "a picture", "a cat and a dog"]
TEMPLATE = (
    "{% for m in messages %}{{ 'USER ' if m['role'] == 'user' else 'ASSISTANT ' }}{% for c in m['content'] %}"
    "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT ' }}{% endif %}"
)


def record(index, turns=1, **changes):
    said = [("what is in the picture", ANSWERS[(index + turn) % len(ANSWERS)]) for turn in range(turns)]
    conversation = []
    for turn, (question, answer) in enumerate(said):
        conversation.append({"from": "human", "value": ("" if turn else "<image>\n") + question})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": str(index), "image": f"{index}.png", "conversations": conversation} | changes


def write_data(folder, records):
    """data.json in `folder`, a record a line, and an image for each."""
    folder.mkdir(exist_ok=True)
    for index in range(len(records)):
        build.image(index).save(folder / f"{index}.png")
    lines = ",\n".join(json.dumps(item) for item in records)
    (folder / "data.json").write_text(f"[\n{lines}\n]", encoding="utf-8")
    return folder / "data.json"


@pytest.fixture(scope="package")
def processor():
    made = make_processor(build.SPECIAL + build.WORDS, build.PIXELS, build.PATCH)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="package")
def stock_folder(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("stock")
    build.stock(build.torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def stf_folder(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("stf")
    build.stf(build.torch.float32).save_pretrained(folder)
    li.LlavaStfProcessor.from_llava(processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), [record(index, 1 + index % 2) for index in range(8)])
