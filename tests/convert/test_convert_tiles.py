"""Broken if this fails: a converted LLaVA-NeXT, LLaVA-OneVision or SigLIP LLaVA is not the model that was asked for."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_integration.convert import convert_llava
from tests.convert import checkpoints as ck
from tests.convert.test_convert_folder import load
from tests.llava import build, tiled

WORDS = [*ck.SPECIAL, *ck.WORDS, "<image>", "<pad>", "<video>"]
TEXT = ck.TEXT | {"vocab_size": 64, "pad_token_id": WORDS.index("<pad>")}
TOKENS = {"image_token_index": WORDS.index("<image>")}


def siglip_llava(dtype, **changes):
    vision = build.siglip(image_size=130, vision_use_head=False)
    return build.stock(dtype, vision=vision, vision_feature_select_strategy="full", **changes)


def stock(kind, folder):
    """A stock model of the family, saved with its tokenizer and image settings."""
    text = {"text": build.llama(**TEXT)} if kind != "onevision" else {"video_token_index": WORDS.index("<video>")}
    make = siglip_llava if kind == "siglip" else tiled.MODELS[kind]
    model = make(torch.float32, **text, **TOKENS)
    model.save_pretrained(folder)
    ck.make_tokenizer(WORDS).save_pretrained(folder)
    if kind != "siglip":
        tiled.processor(model).image_processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=["next", "onevision", "siglip"])
def both(request, tmp_path_factory):
    """(stock folder, stock model, converted folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = stock(request.param, folder / "stock")
    convert_llava(folder / "stock", folder / "stf", auto_map=True)
    return folder / "stock", model, folder / "stf"


def test_equals_from_llava_in_memory(both):
    _, model, dst = both
    expected = ck.in_memory(model)
    converted = build.load(dst)
    assert type(converted) is type(expected)
    assert build.same_state(converted, expected)
    r = expected.config.spatial_merge_size
    notes = json.loads((dst / "conversion.json").read_text())["notes"]
    assert any(f"windows of {r}x{r} patches" in note for note in notes)
    assert converted.config.model_type in (dst / "README.md").read_text()


def test_truncated(both, dst):
    src, model, _ = both
    convert_llava(src, dst, merge_size=2, truncate=True)
    expected = ck.in_memory(model, merge_size=2, truncate=True)
    assert build.same_state(build.load(dst), expected)
    processor = AutoProcessor.from_pretrained(dst)
    counts = expected.model.image_token_counts(tiled.SIZES, image_sizes=tiled.SIZES)
    assert processor._get_num_multimodal_tokens(image_sizes=tiled.SIZES).num_image_tokens == counts


def test_a_fresh_process_without_the_package(both, tmp_path):
    """What --auto-map wrote answers as the model in memory does."""
    _, _, dst = both
    model, processor = build.load(dst), AutoProcessor.from_pretrained(dst)
    inputs = processor(images=Image.new("RGB", (70, 40), "red"), text="USER: <image> what", return_tensors="pt")
    found = load(dst, cache=tmp_path, installed=False, trust_remote_code=True)
    assert found["classes"] == [type(part).__name__ for part in (model, model.model, processor)]
    assert found["tokens"] == model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()


def test_refusals(refused, tmp_path, dst):
    src = tmp_path / "next"
    stock("next", src)
    refused(r"^--merge-size: expected a divisor of .* or --truncate, got 5", src, dst, convert_llava, merge_size=5)
    settings = json.loads((src / "preprocessor_config.json").read_text())
    ck.write_json(src / "preprocessor_config.json", settings | {"image_grid_pinpoints": [[56, 56]]})
    refused(r"^preprocessor_config\.json: expected the image_grid_pinpoints of config\.json", src, dst, convert_llava)
    config = json.loads((src / "config.json").read_text())
    ck.write_json(src / "config.json", config | {"model_type": "llava_next_video"})
    refused(r"got 'llava_next_video'", src, dst, convert_llava)
