"""Broken if this fails: a saved LLaVA-STF folder does not come back bit for bit, or not through the Auto classes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

import llava_integration as li
from tests.llava import build
from tests.support.processes import python


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bit_for_bit_through_the_auto_classes(tmp_path, dtype):
    stf = build.stf(dtype)
    stf.save_pretrained(tmp_path)
    loaders = (AutoModelForImageTextToText, AutoModelForMultimodalLM, li.LlavaStfForConditionalGeneration)
    for loader in loaders:
        loaded = build.load(tmp_path, loader)
        assert type(loaded) is li.LlavaStfForConditionalGeneration
        assert loaded.dtype == dtype
        assert build.same_state(stf, loaded)
    assert type(AutoConfig.from_pretrained(tmp_path)) is li.LlavaStfConfig
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is li.LlavaStfModel
    assert build.same_state(stf.model, base)


@pytest.mark.parametrize("part", ["whole", "base"])
def test_keys_are_the_modules_names(tmp_path, part):
    """A resumed Trainer loads them with strict=False: other names would be lost without a word."""
    stf = build.stf() if part == "whole" else build.stf().model
    stf.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stf.state_dict().keys()


def test_the_stock_names_when_asked(stf, tmp_path):
    stf.save_pretrained(tmp_path, save_original_format=True)
    assert "language_model.model.embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert build.same_state(stf, AutoModelForImageTextToText.from_pretrained(tmp_path))


def test_old_llava_key_names_load(stf, tmp_path):
    stf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {build.oldest_name(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert build.same_state(stf, build.load(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, 3]}, r"layer: expected 3 layers, .*mbtf\.linear_1\.weight .* got 2: \[5, 3\]; "),
        ({"spatial_merge_size": 4}, r"size: expected windows of 4 tokens, .*stf\.linear_1\.weight .* got 16: 4; "),
        ({"mbtf_hidden_size": 7}, "mbtf_hidden_size: expected 128 units, .* got 7: 7; "),
        ({"stf_hidden_size": 7}, "stf_hidden_size: expected 512 units, .* got 7: 7; "),
        ({"use_mbtf": False, "vision_feature_layer": 5}, "use_mbtf, .*: expected a place for the stored .*=False"),
        ({"multimodal_projector_bias": False}, r"expected a place for the stored .*mbtf\.linear_1\.bias, got"),
    ],
    ids=str,
)
@pytest.mark.parametrize("loader", [AutoModelForImageTextToText, li.LlavaStfModel])
def test_keywords_that_the_weights_were_not_built_for(stf, tmp_path, loader, changes, message):
    stf.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(tmp_path, **changes)


def test_another_number_of_layers_to_train_anew(stf, tmp_path):
    stf.save_pretrained(tmp_path)
    options = {"vision_feature_layer": [5, 3], "ignore_mismatched_sizes": True}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **options)
    assert loaded.model.multi_modal_projector.mbtf.linear_1.in_features == 64


def test_a_folder_of_the_stock_llava(stock, tmp_path):
    stock.save_pretrained(tmp_path)
    for loader in (li.LlavaStfForConditionalGeneration, li.LlavaStfModel, li.LlavaStfConfig):
        with pytest.raises(ValueError, match=r"expected model_type 'llava_stf', got 'llava'; .*from_llava"):
            loader.from_pretrained(tmp_path)
    for config in (stock.config, stock.config.text_config):
        with pytest.raises(TypeError, match=r"config: expected a LlavaStfConfig, got a L.*from_llava"):
            li.LlavaStfForConditionalGeneration(config)


def test_found_by_name_in_every_module_object_that_is_called_transformers():
    """transformers itself leaves a second one while it is imported."""
    code = """
import sys, transformers
first = transformers
import llava_integration as li
for module in (first, sys.modules["transformers"]):
    for name in ("LlavaStfForConditionalGeneration", "LlavaStfModel", "LlavaStfConfig", "LlavaStfProcessor"):
        assert getattr(module, name) is getattr(li, name)
assert not li.LlavaStfConfig().auto_map and "auto_map" not in li.LlavaStfConfig().to_dict()
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_pipeline(stf, processor, tmp_path):
    stf.float().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=build.load(tmp_path), processor=processor)
    content = [{"type": "image", "image": build.image()}, {"type": "text", "text": "what is in the picture"}]
    messages = [{"role": "USER", "content": content}]
    (out,) = pipe(text=messages, max_new_tokens=3, return_full_text=False)
    assert isinstance(out["generated_text"], str)
