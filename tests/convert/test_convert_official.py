"""Broken if this fails: a converted LLaVA-STF computes something else than the official model, silently."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import llava_integration as li
from llava_integration.convert import convert_official
from tests.convert import checkpoints as ck


def features(folder, pixels):
    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return torch.stack(model.get_image_features(pixels.double()).pooler_output)


def same(one, other):
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "shards"), [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)])
def test_features_equal_an_independent_computation_in_channel_major_order(tmp_path, form, shards):
    src = ck.make_official(tmp_path, shards, form)
    before = ck.snapshot(tmp_path / "official")
    convert_official(src, tmp_path / "stf", max_shard_bytes=300_000)
    pixels = ck.make_pixels()
    expected = ck.official_features(ck.make_tower(), ck.make_projector(), pixels)
    assert same(features(tmp_path / "stf", pixels), expected)
    assert ck.snapshot(src) == before, "SRC is only read"
    assert len(list((tmp_path / "stf").glob("model-*.safetensors"))) > 2
    assert max(file.stat().st_size for file in (tmp_path / "stf").glob("*.safetensors")) <= 300_000


def test_the_language_model_is_the_same(converted):
    model, info = AutoModelForImageTextToText.from_pretrained(converted, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        expected = ck.make_language()(ids).logits
        logits = model(ids).logits
    assert torch.equal(logits[..., : ck.ROWS], expected)
    assert model.config.text_config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("held", ["embeddings", "head", "both, different"])
def test_a_head_that_config_json_ties(tmp_path, held):
    src = ck.make_official(tmp_path, tie_word_embeddings=True)
    tensors, apart = ck.whole_tensors(), held == "both, different"
    embeddings, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    if not apart:
        del tensors["lm_head.weight" if held == "embeddings" else "model.embed_tokens.weight"]
    ck.write_bin(src, tensors, shards=2)
    convert_official(src, tmp_path / "stf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stf")
    assert torch.equal(model.lm_head.weight, embeddings if held == "embeddings" else head)
    assert torch.equal(model.get_input_embeddings().weight, head if held == "head" else embeddings)
    assert model.config.tie_word_embeddings != apart


def test_vocabulary(converted):
    """As transformers' LLaVA checkpoints: the image token behind the tokenizer's own, rows to a multiple of 64."""
    model = AutoModelForImageTextToText.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    known = len(ck.SPECIAL + ck.WORDS)
    assert processor.image_token_id == model.config.image_token_index == known
    assert processor.tokenizer.pad_token_id == known + 1 != processor.tokenizer.unk_token_id
    assert model.config.text_config.vocab_size == ck.ROWS, "there was room"
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == known + 1


def test_vocabulary_without_room_grows_by_average_rows(tmp_path):
    src = ck.make_official(tmp_path, tokenizer=False)
    words = [*ck.SPECIAL, *ck.WORDS]
    ck.make_tokenizer(words + [f"w{i}" for i in range(ck.ROWS - len(words))]).save_pretrained(src)
    convert_official(src, tmp_path / "stf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stf")
    assert model.config.image_token_index == ck.ROWS
    assert model.config.text_config.vocab_size == 64
    language = ck.make_language()
    pairs = ((model.lm_head, language.lm_head), (model.get_input_embeddings(), language.get_input_embeddings()))
    for ours, theirs in pairs:
        assert torch.equal(ours.weight[: ck.ROWS], theirs.weight)
        assert torch.allclose(ours.weight[ck.ROWS :], theirs.weight.mean(0).expand(24, -1), atol=1e-7)


def test_geometry_in_the_configuration(converted):
    config = li.LlavaStfConfig.from_pretrained(converted)
    assert config.vision_feature_layer == ck.BLOCKS
    assert (config.spatial_merge_size, config.image_seq_length) == (2, 4)
    assert (config.mbtf_hidden_size, config.stf_hidden_size) == (4 * ck.C, 16 * ck.C)
    assert config.feature_order == "patch_major"
    assert config.vision_config.image_size == ck.PIXELS


def test_report(official, tmp_path):
    report = convert_official(official, tmp_path / "stf")
    written = json.loads((tmp_path / "stf" / "conversion.json").read_text())
    assert written["tensors"] == {kind: lines for kind, lines in report.tensors.items() if lines}
    (relaid_out,) = report.tensors["relaid out"]
    assert relaid_out == "model.multi_modal_projector.stf.linear_1.weight <- model.mm_projector.0.weight"
    count = sum(len(lines) for lines in report.tensors.values())
    assert count == len(ck.whole_tensors())


def test_computed_buffers_of_older_checkpoints_are_left_over(tmp_path):
    src = ck.make_official(tmp_path)
    tensors = ck.whole_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (src / "pytorch_model.bin.index.json").unlink()
    ck.write_bin(src, tensors)
    report = convert_official(src, tmp_path / "stf")
    assert len(report.tensors["left over"]) == 2


@pytest.mark.parametrize(
    ("blocks", "window", "mbtf", "layers"),
    [(3, 2, True, [22, 10, 4]), (2, 1, True, [3, 20]), (1, 4, False, [23]), (8, 4, True, ck.BLOCKS)],
)
def test_other_geometries_from_the_shapes(tmp_path, blocks, window, mbtf, layers):
    tower, projector = ck.make_tower(), ck.make_projector(5, blocks, window, mbtf)
    src = ck.make_official(tmp_path)
    (src / "pytorch_model.bin.index.json").unlink()
    ck.write_bin(src, ck.official_tensors(tower, ck.make_language(), projector))
    given = None if len(layers) in (1, 8) else layers
    convert_official(src, tmp_path / "stf", blocks=given)
    config = li.LlavaStfConfig.from_pretrained(tmp_path / "stf")
    assert (config.spatial_merge_size, config.use_mbtf, config.vision_feature_layer) == (window, mbtf, layers)
    pixels = ck.make_pixels(1)
    expected = ck.official_features(tower, projector, pixels, layers, window)
    assert same(features(tmp_path / "stf", pixels), expected)


def test_a_grid_that_does_not_divide_is_cut_as_in_the_official_code(tmp_path):
    tower, projector = ck.make_tower(), ck.make_projector(5, window=3)
    src = ck.make_official(tmp_path)
    (src / "pytorch_model.bin.index.json").unlink()
    ck.write_bin(src, ck.official_tensors(tower, ck.make_language(), projector))
    report = convert_official(src, tmp_path / "stf")
    assert any("dropped" in note for note in report.notes)
    pixels = ck.make_pixels(1)
    assert same(features(tmp_path / "stf", pixels), ck.official_features(tower, projector, pixels, window=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(official, tmp_path, dtype):
    convert_official(official, tmp_path / "stf", dtype=dtype)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stf")
    assert model.dtype == dtype
    assert torch.equal(model.lm_head.weight, ck.make_language().lm_head.weight.to(dtype))


def test_tower_weights_from_its_folder(tmp_path):
    """LLaVA leaves a frozen tower out of its checkpoints; mm_vision_tower or --vision-tower has it then."""
    src = ck.make_official(tmp_path, mm_vision_tower="somewhere/else")
    (src / "pytorch_model.bin.index.json").unlink()
    ck.write_bin(src, ck.official_tensors(None, ck.make_language(), ck.make_projector()))
    tower = ck.write_tower(tmp_path / "clip", ck.make_tower(7))
    convert_official(src, tmp_path / "stf", vision_tower=tower)
    pixels = ck.make_pixels(1)
    expected = ck.official_features(ck.make_tower(7), ck.make_projector(), pixels)
    assert same(features(tmp_path / "stf", pixels), expected)

    ck.write_json(src / "config.json", ck.official_config(mm_vision_tower="../clip"))
    convert_official(src, tmp_path / "again")
    assert same(features(tmp_path / "again", pixels), expected)


@pytest.mark.parametrize("pooling_head", [True, False])
def test_a_siglip_tower_has_no_cls_token_and_an_odd_grid(tmp_path, pooling_head):
    """3x3 patches in windows of 2, as 27x27 in SigLIP's own size: one token; pixels normalized its way."""
    torch.manual_seed(6)
    sizes = {name: ck.VISION[name] for name in ck.VISION if name != "projection_dim"} | {"image_size": 42}
    tower = ck.randomize(SiglipVisionModel(SiglipVisionConfig(**sizes)))
    src, folder = ck.make_official(tmp_path), tmp_path / "siglip"
    folder.mkdir()
    ck.write_json(folder / "config.json", {"model_type": "siglip", "vision_config": sizes})
    tensors = ck.official_tensors(tower, ck.make_language(), ck.make_projector())
    (src / "pytorch_model.bin.index.json").unlink()
    ck.write_bin(src, {name: value for name, value in tensors.items() if pooling_head or ".head." not in name})
    ck.write_json(src / "config.json", ck.official_config(mm_vision_tower=str(folder)))
    convert_official(src, tmp_path / "stf")
    pixels = torch.randn(2, 3, 42, 42)
    expected = ck.official_features(tower, ck.make_projector(), pixels, prefix=0)
    assert expected.shape[1] == 1
    assert same(features(tmp_path / "stf", pixels), expected)
    images = AutoProcessor.from_pretrained(tmp_path / "stf").image_processor
    assert (list(images.image_mean), images.do_pad) == ([0.5, 0.5, 0.5], True)
    assert images(Image.new("RGB", (30, 90)), return_tensors="pt")["pixel_values"].shape == (1, 3, 42, 42)


def test_the_known_clip_needs_no_folder():
    from llava_integration.convert.tower import find_tower

    config = find_tower("openai/clip-vit-large-patch14-336", ck.Path("nowhere"), None).config
    assert (config.hidden_size, config.num_hidden_layers, config.image_size, config.patch_size) == (1024, 24, 336, 14)
    assert (config.intermediate_size, config.num_attention_heads, config.hidden_act) == (4096, 16, "quick_gelu")


class TestPretrainForm:
    """mm_projector.bin and a language model, possibly one that has a projector already."""

    def make(self, folder, base_has_projector=False):
        src, base = folder / "pretrain", folder / "vicuna"
        src.mkdir()
        base.mkdir()
        tensors = ck.make_projector(9)
        if base_has_projector:  # other names: what is laid over the base must not depend on them
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        torch.save(tensors, src / "mm_projector.bin")
        ck.write_json(src / "config.json", ck.official_config(mm_vision_tower=str(folder / "clip")))
        ck.write_tower(folder / "clip", ck.make_tower())
        projector = ck.make_projector(3) if base_has_projector else {}
        ck.write_safetensors(base, ck.official_tensors(None, ck.make_language(), projector))
        ck.write_json(base / "config.json", ck.TEXT | {"model_type": "llama"})
        ck.make_tokenizer().save_pretrained(base)
        return src, base

    @pytest.mark.parametrize("base_has_projector", [False, True])
    def test_with_its_base(self, tmp_path, base_has_projector):
        src, base = self.make(tmp_path, base_has_projector)
        convert_official(src, tmp_path / "stf", base=base)
        pixels = ck.make_pixels(1)
        expected = ck.official_features(ck.make_tower(), ck.make_projector(9), pixels)
        assert same(features(tmp_path / "stf", pixels), expected)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stf")
        assert torch.equal(model.lm_head.weight, ck.make_language().lm_head.weight)
        assert AutoProcessor.from_pretrained(tmp_path / "stf").image_processor.do_pad


class TestLora:
    """adapter_model, non_lora_trainables.bin and a base: the merged model, against W + scale * B A in float64."""

    TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")

    def make(self, folder, form="bin", **changes):
        src, base = folder / "lora", folder / "vicuna"
        src.mkdir()
        base.mkdir()
        language = ck.make_language()
        ck.write_bin(base, ck.official_tensors(None, language, {}), shards=2)
        ck.write_json(base / "config.json", ck.TEXT | {"model_type": "llama"})
        ck.make_tokenizer().save_pretrained(base)
        factors = {}
        for i, target in enumerate(self.TARGETS):
            rows, columns = language.get_submodule(target).weight.shape
            factors[f"base_model.model.{target}.lora_A.weight"] = torch.randn(2 + i, columns)
            factors[f"base_model.model.{target}.lora_B.weight"] = torch.randn(rows, 2 + i)
        if form == "bin":
            torch.save(factors, src / "adapter_model.bin")
        else:
            ck.save_file(factors, src / "adapter_model.safetensors")
        others = {f"base_model.model.{name}": value for name, value in ck.make_projector(9).items()}
        torch.save(others, src / "non_lora_trainables.bin")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
        ck.write_json(src / "adapter_config.json", config | changes)
        ck.write_json(src / "config.json", ck.official_config(mm_vision_tower=str(folder / "clip")))
        ck.write_tower(folder / "clip", ck.make_tower())
        return src, base, language, factors

    @pytest.mark.parametrize(
        ("form", "changes", "scales"),
        [
            ("bin", {}, (3, 2)),
            ("safetensors", {"use_rslora": True}, (6 / 2**0.5, 6 / 3**0.5)),
            ("bin", {"alpha_pattern": {"mlp.down_proj": 12}}, (3, 4)),
        ],
    )
    def test_merged_into_its_base(self, tmp_path, form, changes, scales):
        src, base, language, factors = self.make(tmp_path, form, **changes)
        report = convert_official(src, tmp_path / "stf", base=base)
        assert len(report.tensors["merged"]) == 2
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stf")
        state = {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
        for name, value in language.state_dict().items():
            if name.startswith("lm_head"):
                continue
            expected = value.double()
            for target, scale in zip(self.TARGETS, scales, strict=True):
                if name == f"{target}.weight":
                    a, b = (factors[f"base_model.model.{target}.lora_{side}.weight"].double() for side in "AB")
                    expected = expected + scale * (b @ a)
            if not name.endswith("embed_tokens.weight"):
                assert torch.allclose(state[name].double(), expected, rtol=1e-6, atol=1e-6), name
        pixels = ck.make_pixels(1)
        expected = ck.official_features(ck.make_tower(), ck.make_projector(9), pixels)
        assert same(features(tmp_path / "stf", pixels), expected)

    def test_base_named_by_the_adapter(self, tmp_path):
        src, base, *_ = self.make(tmp_path)
        config = json.loads((src / "adapter_config.json").read_text())
        ck.write_json(src / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
        convert_official(src, tmp_path / "stf")
        assert AutoProcessor.from_pretrained(tmp_path / "stf").tokenizer.eos_token == "</s>"
