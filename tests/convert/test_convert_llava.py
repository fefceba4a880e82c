"""Broken if this fails: a folder converted from LLaVA-1.5 is not the model that from_llava makes in memory."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaImageProcessorPil, LlavaProcessor

import llava_integration as li
from llava_integration.convert import convert_llava
from tests.convert import checkpoints as ck
from tests.llava import build


def convert(src, dst, **options):
    convert_llava(src, dst, **options)
    return build.load(dst)


def without_dtypes(config):
    content = config.to_dict()
    for part in (content, content["text_config"], content["vision_config"]):
        for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
            part.pop(name, None)
    return content


@pytest.mark.parametrize("options", [{}, {"merge_size": 4}, {"blocks": [3, 5], "merge_size": 1}])
def test_equals_from_llava_in_memory(stock, dst, options):
    folder, model = stock
    before = ck.snapshot(folder)
    converted, expected = convert(folder, dst, **options), ck.in_memory(model, **options)
    assert build.same_state(converted, expected)
    assert without_dtypes(converted.config) == without_dtypes(expected.config)
    assert len(json.loads((dst / "conversion.json").read_text())["tensors"]["created"]) == 8
    assert ck.snapshot(folder) == before, "SRC is only read"


LAYOUTS = {
    "modules": lambda name: name,
    "oldest": build.oldest_name,
    "between": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_layout_that_the_stock_model_loads(stock, tmp_path, dst, layout, form):
    _, model = stock
    src = tmp_path / "llava"
    src.mkdir()
    tensors = {LAYOUTS[layout](name): value.clone() for name, value in model.state_dict().items()}
    ck.write(src, tensors, 2, form)
    model.config.save_pretrained(src)
    if form == "safetensors":
        assert build.same_state(build.load(src, LlavaForConditionalGeneration), model), "the stock model loads it"
    assert build.same_state(convert(src, dst), ck.in_memory(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(stock, dst, dtype):
    model = LlavaForConditionalGeneration.from_pretrained(stock[0], dtype=dtype)
    assert build.same_state(convert(stock[0], dst, dtype=dtype), ck.in_memory(model))


@pytest.mark.parametrize("held", ["embeddings alone", "head alone", "both, equal", "both, different"])
def test_a_tied_head_as_the_stock_model_reads_it(tmp_path, dst, held):
    """safetensors drops one of two equal tensors; a head that was trained apart stays apart, as in transformers."""
    src = tmp_path / "llava"
    ck.make_stock(src, text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    tensors = load_file(src / "model.safetensors")
    (embeddings,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    if held != "embeddings alone":
        head = tensors[embeddings].clone() if held != "both, different" else torch.randn_like(tensors[embeddings])
        tensors["language_model.lm_head.weight"] = head
    if held == "head alone":
        del tensors[embeddings]
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    converted = convert(src, dst)
    assert build.same_state(converted, ck.in_memory(LlavaForConditionalGeneration.from_pretrained(src)))
    tied = held != "both, different"
    assert (converted.lm_head.weight is converted.get_input_embeddings().weight) == tied
    assert converted.config.tie_word_embeddings == tied
    assert ("kept apart" in (dst / "conversion.json").read_text()) != tied


def test_processor_comes_along(stock, dst):
    folder, _ = stock
    model = convert(folder, dst)
    processor = AutoProcessor.from_pretrained(dst)
    assert type(processor) is li.LlavaStfProcessor
    assert processor.chat_template == "{{ messages[0]['content'] }}"
    assert processor.image_token_id == model.config.image_token_index
    assert (processor.patch_size, processor.spatial_merge_size) == (build.PATCH, 2)
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("pad", [False, True])
def test_processor_as_transformers_5_saves_it(tmp_path, dst, pad):
    """Image settings and the image token within processor_config.json, the template in a file of its own."""
    src = tmp_path / "llava"
    ck.make_stock(src, tokenizer=False)
    tokenizer = ck.make_tokenizer([*ck.SPECIAL, *ck.WORDS, "<picture>", "<pad>"])
    images = LlavaImageProcessorPil(**build.square(), image_mean=[0.1, 0.2, 0.3], do_pad=pad)
    stock = LlavaProcessor(images, tokenizer, patch_size=build.PATCH, image_token="<picture>")
    stock.chat_template = "{{ messages[0]['role'] }}"
    stock.save_pretrained(src)
    assert not (src / "preprocessor_config.json").exists()
    convert_llava(src, dst)
    processor = AutoProcessor.from_pretrained(dst)
    assert (processor.image_token, processor.chat_template) == ("<picture>", stock.chat_template)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.image_processor.do_pad == pad


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"blocks": [3, 2]}, r"^--blocks: expected layer 5 among them.*got \[3, 2\]"),
            ({"blocks": [5, 9]}, r"^--blocks: expected layers from -7 to 6.*got 9"),
            ({"merge_size": 3}, r"^--merge-size: expected a divisor of the 4x4 grid or --truncate, got 3"),
            ({"merge_size": 0}, r"^--merge-size: "),
            ({"truncate": 1}, r"^--truncate: expected a bool, got 1"),
        ],
    )
    def test_options(self, refused, stock, dst, options, match):
        refused(match, stock[0], dst, convert_llava, **options)

    def test_foreign_folders(self, refused, official, converted, tmp_path, dst):
        refused(r"model_type 'llava', .*got 'llava_llama'.*with `official`", official, dst, convert_llava)
        refused(r"converted already", converted, dst, convert_llava)
        (tmp_path / "empty").mkdir()
        match = r"^SRC: expected config\.json in .*name the folder of a stock LLaVA"
        refused(match, tmp_path / "empty", dst, convert_llava)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"vision_feature_layer": [3, 5]}, r"^SRC: expected one vision_feature_layer"),
            ({"vision_feature_select_strategy": "full"}, r"^SRC: .*select_strategy='default'"),
            ({"quantization_config": {"load_in_4bit": True}}, r"^SRC: .*quantization_config"),
            ({"text_config": [1]}, r"^SRC: config\.json: .*text_config.*get the file again"),
            ({"vision_feature_layer": None}, r"^SRC: config\.json: .*vision_feature_layer.*get the file again"),
            ({"vision_feature_layer": 99}, r"^SRC: config\.json: vision_feature_layer: .*from -7 to 6.*got 99"),
            ({"projector_hidden_act": "relu"}, r"^SRC: config\.json: projector_hidden_act: .*got 'relu'"),
            ({"dtype": "nonsense"}, r"^SRC: config\.json: .*nonsense"),
            ({"vision_config": {"model_type": "clip_vision_model", "patch_size": 0}}, r"^SRC: config\.json: "),
            ({"image_token_index": 13}, r"^tokenizer: .*id 13.*got 16 tokens and id 14"),
        ],
    )
    def test_configuration(self, refused, stock, tmp_path, dst, changes, match):
        folder, _ = stock
        src = ck.linked(folder, tmp_path / "llava")
        (src / "config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        ck.write_json(src / "config.json", config | changes)
        if isinstance(changes.get("vision_feature_layer"), list):
            (file,) = folder.glob("*.safetensors")
            tensors = load_file(file)
            name = next(name for name in tensors if name.endswith("projector.linear_1.weight"))
            tensors[name] = torch.cat([tensors[name]] * 2, dim=1)
            (src / file.name).unlink()
            save_file(tensors, src / file.name)
        refused(match, src, dst, convert_llava)

    def test_files(self, refused, tmp_path, dst):
        src = tmp_path / "llava"
        ck.make_stock(src, tokenizer=False)
        ck.write_json(src / "generation_config.json", {"pad_token_id": []})
        refused(r"^SRC: generation_config\.json: expected valid values", src, dst, convert_llava)
        ck.make_tokenizer().save_pretrained(src)
        refused(r"^tokenizer: expected one token for '<image>'", src, dst, convert_llava)
        (file,) = src.glob("*.safetensors")
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if "layers.1.mlp.up_proj" in name))
        save_file(tensors, file)
        match = r"^SRC: 1 tensors are missing: model\.language_model\.layers\.1\.mlp\.up_proj"
        refused(match, src, dst, convert_llava)
