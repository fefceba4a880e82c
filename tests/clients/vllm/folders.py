"""Small LLaVA-STF folders whose attention vLLM's CPU kernels take, and what transformers answers from them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_llava import make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

import llava_integration as li
from llava_integration.convert import convert_llava
from tests.llava import build, tiled

NEW_TOKENS = 12
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
TEMPLATE += "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}ASSISTANT :"
# One image, several, none; the words of a chat with the template.
PROMPTS = [
    ("USER : <image> what is ASSISTANT :", [1]),
    ("USER : <image> a <image> cat ASSISTANT :", [2, 3]),
    ("USER : what is a cat ASSISTANT :", []),
]
VIDEO = ("USER : <video> what is ASSISTANT :", [4, 5])  # of two frames
WORDS = [*build.SPECIAL, *build.WORDS, "<video>"]


def images(seeds: list[int]) -> list:
    return [build.image(seed) for seed in seeds]


def processor() -> LlavaProcessor:
    made = make_processor(build.SPECIAL + build.WORDS, build.PIXELS, build.PATCH)
    made.chat_template = TEMPLATE
    return made


def make(folder: Path, tower: str = "clip", names: str = "new") -> Path:
    """A random model and its processor; names="oldest": tensors as the checkpoints of 2023 call them."""
    sizes = build.wide()
    if tower == "siglip":
        sizes["vision"] = build.siglip(hidden_size=128, intermediate_size=256)
    build.randomize(build.stf(torch.float32, **sizes)).save_pretrained(folder)
    li.LlavaStfProcessor.from_llava(processor()).save_pretrained(folder)
    if names == "oldest":
        file = folder / "model.safetensors"
        tensors = {build.oldest_name(name): tensor for name, tensor in load_file(file).items()}
        assert any(name.startswith("vision_tower.vision_model.") for name in tensors)
        save_file(tensors, file, {"format": "pt"})
    return folder


def converted(folder: Path, family: str = "llava", **options) -> Path:
    """What `python -m llava_integration.convert llava` writes."""
    source, made, sizes = folder / "stock", folder / "stf", build.wide()
    if family == "onevision":
        sizes["vision"] = build.siglip(image_size=130, vision_use_head=False, hidden_size=128, intermediate_size=256)
        sizes["video_token_index"] = WORDS.index("<video>")
    stock = (tiled.MODELS | {"llava": build.stock})[family](torch.float32, **sizes)
    stock.save_pretrained(source)
    if family == "llava":
        processor().save_pretrained(source)
    else:
        build.tokenizer(WORDS, padding_side="left").save_pretrained(source)
        tiled.processor(stock).image_processor.save_pretrained(source)
    convert_llava(source, made, **options)
    return made


def expected(folder: Path, prompts: list = PROMPTS) -> list[list[int]]:
    """The greedy tokens of transformers for each of `prompts`."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    reader, answers = AutoProcessor.from_pretrained(folder), []
    for text, seeds in prompts:
        given = {"videos": [images(seeds)]} if "<video>" in text else {"images": images(seeds)}
        inputs = reader(text=text, **given, return_tensors="pt")
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        answers.append(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist())
    assert len({tuple(answer) for answer in answers}) == len(answers)
    return answers
