"""Broken if this fails: a converted LLaVA-STF computes something else than the official model, silently."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, SiglipVisionConfig, SiglipVisionModel

import llava_integration as li
from llava_integration.convert import convert_official
from llava_integration.convert.tower import find_tower
from tests.convert import checkpoints as ck
from tests.llava import build


def check_features(folder, tower, projector, pixels=None, **options):
    """The folder's image tokens are those of the official computation, in channel-major order and in float64."""
    pixels = ck.make_pixels(1) if pixels is None else pixels
    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        got = torch.stack(model.get_image_features(pixels.double()).pooler_output)
    expected = ck.official_features(tower, projector, pixels, **options)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "shards"), [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)])
def test_features_from_every_form_of_file(tmp_path, dst, form, shards, monkeypatch):
    monkeypatch.setattr("llava_integration.convert.folder.MAX_SHARD_BYTES", 300_000)
    src = ck.make_official(tmp_path, shards, form)
    before = ck.snapshot(src)
    convert_official(src, dst)
    check_features(dst, ck.make_tower(), ck.make_projector(), ck.make_pixels())
    assert ck.snapshot(src) == before, "SRC is only read"
    sizes = [file.stat().st_size for file in dst.glob("model-*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 320_000  # tensors of 300,000 bytes and a header


def test_the_language_model_is_the_same(converted):
    model = build.load(converted)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        expected = ck.make_language()(ids).logits
        logits = model(ids).logits
    assert torch.equal(logits[..., : ck.ROWS], expected)
    assert model.config.text_config.rms_norm_eps == 1e-5
    assert not hasattr(model.config.text_config, "mm_projector_type")


@pytest.mark.parametrize("held", ["embeddings", "head", "both, different"])
def test_a_head_that_config_json_ties(tmp_path, dst, held):
    tensors, apart = ck.whole_tensors(), held == "both, different"
    embeddings, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    if not apart:
        del tensors["lm_head.weight" if held == "embeddings" else "model.embed_tokens.weight"]
    convert_official(ck.make_official(tmp_path, tensors=tensors, tie_word_embeddings=True), dst)
    model = AutoModelForImageTextToText.from_pretrained(dst)
    assert torch.equal(model.lm_head.weight, embeddings if held == "embeddings" else head)
    assert torch.equal(model.get_input_embeddings().weight, head if held == "head" else embeddings)
    assert model.config.tie_word_embeddings != apart


def test_two_names_of_one_tensor(tmp_path, dst):
    """torch saves their values once; a file of safetensors needs them twice."""
    tensors = ck.whole_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    convert_official(ck.make_official(tmp_path, 1, tensors=tensors), dst)
    model = AutoModelForImageTextToText.from_pretrained(dst)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert not model.config.tie_word_embeddings


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


def test_vocabulary_without_room_grows_by_average_rows(tmp_path, dst):
    src = ck.make_official(tmp_path, tokenizer=False)
    words = [*ck.SPECIAL, *ck.WORDS]
    ck.make_tokenizer(words + [f"w{i}" for i in range(ck.ROWS - len(words))]).save_pretrained(src)
    convert_official(src, dst)
    model = AutoModelForImageTextToText.from_pretrained(dst)
    assert model.config.image_token_index == ck.ROWS
    assert model.config.text_config.vocab_size == 64
    language = ck.make_language()
    pairs = ((model.lm_head, language.lm_head), (model.get_input_embeddings(), language.get_input_embeddings()))
    for ours, theirs in pairs:
        assert torch.equal(ours.weight[: ck.ROWS], theirs.weight)
        assert torch.allclose(ours.weight[ck.ROWS :], theirs.weight.mean(0).expand(24, -1), atol=1e-7)


def test_configuration(converted):
    config = li.LlavaStfConfig.from_pretrained(converted)
    assert config.architectures == ["LlavaStfForConditionalGeneration"]
    assert config.vision_feature_layer == ck.BLOCKS
    assert (config.spatial_merge_size, config.image_seq_length) == (2, 4)
    assert (config.mbtf_hidden_size, config.stf_hidden_size) == (4 * ck.C, 16 * ck.C)
    assert (config.feature_order, config.dtype) == ("patch_major", torch.float32)
    assert config.vision_config.image_size == build.PIXELS


def test_report(official, dst):
    report = convert_official(official, dst)
    written = json.loads((dst / "conversion.json").read_text())
    assert written["tensors"] == report.tensors
    (relaid_out,) = report.tensors["relaid out"]
    assert relaid_out == "model.multi_modal_projector.stf.linear_1.weight <- model.mm_projector.0.weight"
    assert sum(map(len, report.tensors.values())) == len(ck.whole_tensors())


def test_computed_buffers_of_older_checkpoints_are_left_over(src, dst):
    inverse, positions = "layers.0.self_attn.rotary_emb.inv_freq", "embeddings.position_ids"
    older = {f"model.{inverse}": torch.ones(6), f"model.vision_tower.vision_tower.{positions}": torch.arange(17)[None]}
    ck.rewrite(src, lambda tensors: tensors.update(older))
    assert len(convert_official(src, dst).tensors["left over"]) == 2


@pytest.mark.parametrize(
    ("blocks", "window", "mbtf", "layers"),
    [
        (3, 2, True, [22, 10, 4]),
        (2, 1, True, [3, 20]),
        (1, 4, False, [23]),
        (8, 4, True, ck.BLOCKS),
        (8, 3, True, ck.BLOCKS),  # does not divide the grid: cut as in the official code
    ],
)
def test_other_geometries_from_the_shapes(tmp_path, dst, blocks, window, mbtf, layers):
    tower, projector = ck.make_tower(), ck.make_projector(5, blocks, window, mbtf)
    src = ck.make_official(tmp_path, tensors=ck.official_tensors(tower, ck.make_language(), projector))
    report = convert_official(src, dst, blocks=None if len(layers) in (1, 8) else layers)
    config = li.LlavaStfConfig.from_pretrained(dst)
    assert (config.spatial_merge_size, config.use_mbtf, config.vision_feature_layer) == (window, mbtf, layers)
    assert any("dropped" in note for note in report.notes) == (window == 3)
    check_features(dst, tower, projector, blocks=layers, window=window)


def test_tower_weights_from_its_folder(tmp_path, dst):
    """LLaVA leaves a frozen tower out of its checkpoints; mm_vision_tower or --vision-tower has it then."""
    tensors = ck.official_tensors(None, ck.make_language(), ck.make_projector())
    src = ck.make_official(tmp_path, tensors=tensors, mm_vision_tower="somewhere/else")
    convert_official(src, dst, vision_tower=ck.write_tower(tmp_path / "clip", ck.make_tower(7)))
    check_features(dst, ck.make_tower(7), ck.make_projector())
    ck.write_json(src / "config.json", ck.official_config(mm_vision_tower="../clip"))
    convert_official(src, tmp_path / "again")
    check_features(tmp_path / "again", ck.make_tower(7), ck.make_projector())


@pytest.mark.parametrize("pooling_head", [True, False])
def test_a_siglip_tower_has_no_cls_token_and_an_odd_grid(tmp_path, dst, pooling_head):
    """3x3 patches in windows of 2, as 27x27 in SigLIP's own size: one token; pixels normalized its way."""
    torch.manual_seed(6)
    sizes = {name: ck.VISION[name] for name in ck.VISION if name != "projection_dim"} | {"image_size": 42}
    tower, folder = ck.randomize(SiglipVisionModel(SiglipVisionConfig(**sizes))), tmp_path / "siglip"
    folder.mkdir()
    ck.write_json(folder / "config.json", {"model_type": "siglip", "vision_config": sizes})
    tensors = ck.official_tensors(tower, ck.make_language(), ck.make_projector())
    tensors = {name: value for name, value in tensors.items() if pooling_head or ".head." not in name}
    convert_official(ck.make_official(tmp_path, tensors=tensors, mm_vision_tower=str(folder)), dst)
    check_features(dst, tower, ck.make_projector(), torch.randn(2, 3, 42, 42), prefix=0)
    images = AutoProcessor.from_pretrained(dst).image_processor
    assert (list(images.image_mean), images.do_pad) == ([0.5, 0.5, 0.5], True)
    assert images(Image.new("RGB", (30, 90)), return_tensors="pt")["pixel_values"].shape == (1, 3, 42, 42)


def test_the_known_clip_needs_no_folder():
    config = find_tower("openai/clip-vit-large-patch14-336", ck.Path("nowhere"), None).config
    assert (config.hidden_size, config.num_hidden_layers, config.image_size, config.patch_size) == (1024, 24, 336, 14)
    assert (config.intermediate_size, config.num_attention_heads, config.hidden_act) == (4096, 16, "quick_gelu")


def make_base(folder, projector=None):
    """(SRC, base): a folder for what was trained, which names its tower, and the language model that it needs."""
    src, base = folder / "trained", folder / "vicuna"
    src.mkdir()
    base.mkdir()
    ck.write(base, ck.official_tensors(None, ck.make_language(), projector or {}), shards=2)
    ck.write_json(base / "config.json", ck.TEXT | {"model_type": "llama"})
    ck.make_tokenizer().save_pretrained(base)
    ck.write_json(src / "config.json", ck.official_config(mm_vision_tower=str(folder / "clip")))
    ck.write_tower(folder / "clip", ck.make_tower())
    return src, base


class TestPretrainForm:
    """mm_projector.bin and a language model, possibly one that has a projector already."""

    @pytest.mark.parametrize("base_has_projector", [False, True])
    def test_with_its_base(self, tmp_path, dst, base_has_projector):
        src, base = make_base(tmp_path, ck.make_projector(3) if base_has_projector else None)
        tensors = ck.make_projector(9)
        if base_has_projector:  # other names: what is laid over the base must not depend on them
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        torch.save(tensors, src / "mm_projector.bin")
        convert_official(src, dst, base=base)
        check_features(dst, ck.make_tower(), ck.make_projector(9))
        model = AutoModelForImageTextToText.from_pretrained(dst)
        assert torch.equal(model.lm_head.weight, ck.make_language().lm_head.weight)
        assert AutoProcessor.from_pretrained(dst).image_processor.do_pad


class TestLora:
    """adapter_model, non_lora_trainables.bin and a base: the merged model, against W + scale * B A in float64."""

    TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")

    def make(self, folder, form="bin", **changes):
        src, base = make_base(folder)
        language = ck.make_language()
        factors = {}
        for i, target in enumerate(self.TARGETS):
            rows, columns = language.get_submodule(target).weight.shape
            factors[f"base_model.model.{target}.lora_A.weight"] = torch.randn(2 + i, columns)
            factors[f"base_model.model.{target}.lora_B.weight"] = torch.randn(rows, 2 + i)
        save = torch.save if form == "bin" else ck.save_file
        save(factors, src / f"adapter_model.{form}")
        others = {f"base_model.model.{name}": value for name, value in ck.make_projector(9).items()}
        torch.save(others, src / "non_lora_trainables.bin")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
        ck.write_json(src / "adapter_config.json", config | changes)
        return src, base, language, factors

    @pytest.mark.parametrize(
        ("form", "changes", "scales"),
        [
            ("bin", {}, (3, 2)),
            ("safetensors", {"use_rslora": True}, (6 / 2**0.5, 6 / 3**0.5)),
            ("bin", {"alpha_pattern": {"mlp.down_proj": 12}}, (3, 4)),
        ],
    )
    def test_merged_into_its_base(self, tmp_path, dst, form, changes, scales):
        src, base, language, factors = self.make(tmp_path, form, **changes)
        report = convert_official(src, dst, base=base)
        assert len(report.tensors["merged"]) == 2
        expected = {name: value.double() for name, value in language.model.state_dict().items()}
        for target, scale in zip(self.TARGETS, scales, strict=True):
            a, b = (factors[f"base_model.model.{target}.lora_{side}.weight"].double() for side in "AB")
            expected[f"{target.removeprefix('model.')}.weight"] += scale * (b @ a)
        model = AutoModelForImageTextToText.from_pretrained(dst).model.language_model
        for name, value in model.state_dict().items():
            value = value[: ck.ROWS] if "embed" in name else value
            assert torch.allclose(value.double(), expected[name], rtol=1e-6, atol=1e-6), name
        check_features(dst, ck.make_tower(), ck.make_projector(9))

    def test_base_named_by_the_adapter(self, tmp_path, dst):
        src, base, *_ = self.make(tmp_path)
        config = json.loads((src / "adapter_config.json").read_text())
        ck.write_json(src / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
        convert_official(src, dst)
        assert AutoProcessor.from_pretrained(dst).tokenizer.eos_token == "</s>"
