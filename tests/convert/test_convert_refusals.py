"""Broken if this fails: what is damaged, hostile or foreign is converted, executed or ends in a riddle."""

import json
import os
import pickle

import pytest
import torch

from llava_integration.convert import ConversionError, convert_llava, convert_official
from llava_integration.convert.official import block_layers
from llava_integration.convert.processor import settle_vocabulary
from tests.convert import checkpoints as ck
from tests.llava import build

SHARD, INDEX = "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"
EMBEDDINGS, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
NORM, FIRST, LAST = "model.norm.weight", "model.mm_projector.0.weight", "model.mm_projector.2.weight"


class TestFiles:
    @pytest.mark.parametrize("form", ["bin", "safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_truncated(self, refused, tmp_path, dst, form, share):
        src = ck.make_official(tmp_path, 2, form)
        (file,) = src.glob(f"*-00002-of-00002.{form}")
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        refused(rf"-00002-of-00002\.{form}: truncated.*get the file again", src, dst)

    @pytest.mark.parametrize(
        ("file", "content", "match"),
        [
            (SHARD, None, rf"index\.json: names {SHARD}, which is not in the folder"),
            (SHARD, {}, r"index\.json: names lm_head\.weight, which no file holds"),
            (SHARD, "version https://git-lfs.github.com/spec/v1\noid x\n", r"got a git-lfs pointer; run git lfs pull"),
            (SHARD, {"x": {"y": torch.ones(1)}, "epoch": 3}, r"expected a dict of tensors, got dict, int"),
            (INDEX, '{"weight_map": {', r"index\.json: expected JSON"),
            (INDEX, "[]", r"index\.json: expected a JSON object, got list"),
            (INDEX, '{"weight_map": 3}', r"index\.json: expected a weight_map of tensor names to files"),
            (INDEX, '{"weight_map": {"x": "../secret.bin"}}', r"names \.\./secret\.bin, which is not in the folder"),
            (INDEX, None, r"^SRC: expected one of model\.safetensors\.index\.json"),
            ("config.json", None, r"^SRC: expected config\.json"),
            ("tokenizer.json", "{}", r"tokenizer\.json: expected a tokenizer"),
        ],
    )
    def test_a_file(self, refused, src, dst, file, content, match):
        """None: the file is not there; a string: its text; else what torch has saved in it."""
        if content is None:
            (src / file).unlink()
        elif isinstance(content, str):
            (src / file).write_text(content)
        else:
            torch.save(content, src / file)
        refused(match, src, dst)

    class Bomb:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return os.system, (f"touch {self.path}",)

    @pytest.mark.parametrize("kind", ["torch.save", "plain pickle", "safetensors name"])
    def test_a_pickle_with_code_in_it_is_not_executed(self, refused, src, dst, tmp_path, kind):
        mark, file = tmp_path / "executed", src / SHARD
        content = {"model.norm.weight": self.Bomb(mark)}
        if kind == "torch.save":
            torch.save(content, file)
        else:
            file.write_bytes(pickle.dumps(content))
        match = {"torch.save": "code in it, which was not executed"}.get(kind, "truncated or not")
        if kind == "safetensors name":
            file.rename(src / "model.safetensors")
        refused(match, src, dst)
        assert not mark.exists()


def without(*parts):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(part in name for part in parts)]


def plus(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def stock_projector(tensors):
    without("crosslayer")(tensors)
    tensors[FIRST] = torch.randn(ck.D, ck.C)


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (without(UP), r"^SRC: 1 tensors are missing: model\..*complete the checkpoint"),
            (without("mm_projector_crosslayer.2.bias"), r"^SRC: 1 tensors are missing: model\..*complete the"),
            (without("mm_projector_crosslayer.2.weight"), r"^SRC: 1 tensors are missing: model\..*complete the"),
            (without("vision_tower"), r"found no weights of the vision tower tower; give --vision-tower DIR"),
            (without("mm_projector", "vision_tower"), r"expected an official LLaVA-STF .*got tensors such"),
            (without(EMBEDDINGS), r"embed_tokens\.weight: expected a matrix .*, got none"),
            (plus(EMBEDDINGS, torch.tensor(1.0)), r"embed_tokens\.weight: expected a matrix.*shape \[\]"),
            (plus("model.image_newline", torch.ones(ck.D)), r"^SRC: 1 tensors are left over: model\.image_newline"),
            (plus("model.mm_projector.4.weight", torch.ones(2, 2)), r"left over: model\.mm_projector\.4\.weight"),
            (plus(f"module.{NORM}", torch.ones(ck.D)), r"norm\.weight .* are both model\..*norm\.weight; remove"),
            (plus(NORM, torch.ones(49)), r"norm\.weight in pytorch.*: expected shape \[48\].*got \[49\]"),
            (plus(UP, torch.ones(64, 48, dtype=torch.int8)), r"up_proj\.weight in .*: expected float32, float16 or"),
            (plus(FIRST, torch.ones(9)), r"linear_1\.weight: expected a matrix, got shape \[9\]"),
            (plus(FIRST, torch.ones(9, 100)), r"expected columns in multiples of .* got 100"),
            (plus(FIRST, torch.ones(9, 96)), r"expected a square window of tokens, got 3"),
            (plus(LAST, torch.ones(9, 512)), r"mm_projector\.2\.weight in .*expected shape \[48, 512\]"),
            (stock_projector, r"so this is LLaVA-1\.5, not LLaVA-STF"),
        ],
    )
    def test_in_the_checkpoint(self, refused, src, dst, change, match):
        ck.rewrite(src, change)
        refused(match, src, dst)

    def test_values_that_float16_cannot_hold(self, refused, src, dst):
        ck.rewrite(src, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
        refused(r"^--dtype: model\.language_model\.norm\.weight has values up to 1e\+05", src, dst, dtype=torch.float16)

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_values_that_are_none(self, refused, src, dst, value):
        name = "model.layers.0.self_attn.q_proj.weight"
        ck.rewrite(src, lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
        refused(rf"^SRC: {name} in .*: 2 of \d+ values are NaN or infinite; .*--allow-nonfinite$", src, dst)
        report = convert_official(src, dst, allow_nonfinite=True)
        assert [line.partition(" in ")[0] for line in report.warnings if "NaN" in line] == [name]
        assert name in (dst / "conversion.json").read_text()

    def test_a_folder_of_transformers(self, refused, stock, dst):
        refused(r"config\.json|mm_vision_tower", stock[0], dst)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"mm_projector_type": "linear"}, "mm_projector_type: expected 'mlp2x_gelu', got 'linear'"),
            ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: expected 'pad' or 'square'"),
            ({"model_type": "llava_mpt"}, "expected model_type llava_llama, got 'llava_mpt'"),
            ({"mm_vision_tower": None}, "mm_vision_tower: expected a name, got None.*--vision-tower DIR"),
            ({"mm_vision_tower": "google/siglip"}, "neither a local folder nor one of.*--vision-tower DIR"),
            ({"num_hidden_layers": 3}, r"9 tensors are missing"),
            ({"num_hidden_layers": 1}, r"9 tensors are left over"),
            ({"mm_vision_select_layer": [99] * 8}, r"^SRC: config\.json: mm_vision_select_layer: .*got 99"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end: expected False, got True"),
            ({"num_hidden_layers": "two"}, "^SRC: config.json: .*num_hidden_layers.*'two'.*get the file again"),
            ({"num_attention_heads": 5}, r"^SRC: config\.json: .*attention heads \(5\)"),
            ({"rope_scaling": {"type": "nonsense"}}, r"^SRC: config\.json: .*nonsense"),
            ({"hidden_act": "nonsense"}, r"^SRC: config\.json: .*nonsense"),
            ({"model_type": ["llava_llama"]}, "expected model_type llava_llama, got"),
            ({"mm_vision_tower": 5}, r"^SRC: config\.json: mm_vision_tower: expected a name, got 5"),
            ({"mm_vision_select_layer": -3}, r"^--blocks: the checkpoint does not name its 8 blocks"),
        ],
    )
    def test_of_the_checkpoint(self, refused, src, dst, changes, match):
        ck.write_json(src / "config.json", ck.official_config(**changes))
        refused(match, src, dst)

    @pytest.mark.parametrize(
        "change", [None, {"hidden_size": "a"}, {"patch_size": 0}, {"patch_size": 100}, {"num_attention_heads": 7}]
    )
    def test_of_the_tower(self, refused, src, dst, change):
        vision = ck.VISION | change if change else [1]
        ck.write_json(src.parent / "tower" / "config.json", {"model_type": "clip", "vision_config": vision})
        refused(r"tower/config\.json: expected valid values, got .*get the file again", src, dst)

    def test_of_another_tower(self, refused, src, dst):
        ck.write_json(src.parent / "tower" / "config.json", {"model_type": "vit"})
        refused(r"tower/config\.json: expected the vision tower of CLIP or SigLIP, got 'vit'", src, dst)
        (src.parent / "empty").mkdir()
        refused(r"^--vision-tower: expected a folder with config\.json", src, dst, vision_tower=src.parent / "empty")

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"size": "big"}, r"expected valid values, got .*correct the file or remove it"),
            ({"size": {"height": 1}}, r"expected valid values, got"),
            ({"rescale_factor": "x"}, r"expected valid values, got"),
            ({"size": 28, "crop_size": 28}, r"expected images of 56x56.*got 28x28"),
        ],
    )
    def test_of_the_images(self, refused, src, dst, settings, match):
        ck.write_json(src / "preprocessor_config.json", settings)
        refused(rf"^preprocessor_config\.json: {match}", src, dst)

    @pytest.mark.parametrize(
        ("options", "match"),
        [({"blocks": blocks}, r"^--blocks: expected ") for blocks in (3, [], ["a"] * 8, [99] * 8, ck.BLOCKS[:3])]
        + [({"dtype": torch.int8}, r"^--dtype: expected float32, float16 or bfloat16, got torch.int8")],
    )
    def test_options(self, refused, src, dst, options, match):
        refused(match, src, dst, **options)

    def test_tokenizer_without_room_for_the_image_token(self, refused, src, dst):
        ck.make_tokenizer([*ck.SPECIAL, *(f"w{i}" for i in range(ck.ROWS))]).save_pretrained(src)
        refused(r"^tokenizer: expected ids below 40.*got 42; there is no room for <image>", src, dst)

    def test_settings_of_the_tokenizer(self, refused, src, dst):
        settings = json.loads((src / "tokenizer_config.json").read_text())
        ck.write_json(src / "tokenizer_config.json", settings | {"model_max_length": []})
        refused(r"tokenizer\.json: expected a tokenizer", src, dst)


class TestBlocks:
    """config.json does not name them: other blocks than the trained ones would go unnoticed."""

    @pytest.mark.parametrize(
        ("layers", "blocks"), [(24, [23, 21, 18, 15, 12, 9, 6, 3]), (12, [11, 9, 6, 3]), (6, [5, 3]), (8, [7, 6, 3])]
    )
    def test_the_published_rule(self, layers, blocks):
        assert block_layers(len(blocks), layers, -2, None) == blocks

    @pytest.mark.parametrize(("layers", "count", "selected"), [(24, 7, -2), (24, 8, -3), (6, 3, -2)])
    def test_what_the_rule_does_not_give_must_be_named(self, layers, count, selected):
        with pytest.raises(ConversionError, match=f"--blocks.*{count} blocks of a tower of {layers}"):
            block_layers(count, layers, selected, None)

    def test_what_is_named_wins(self):
        assert block_layers(2, 6, -2, [4, 1]) == [4, 1]
        assert block_layers(2, 6, [4, 2], None) == [4, 2]


class TestBase:
    """An adapter or a projector alone, and the checkpoint that it needs."""

    QUERY = "model.layers.0.self_attn.q_proj"

    @pytest.fixture
    def lora(self, tmp_path):
        folder = tmp_path / "lora"
        folder.mkdir()
        ck.write_json(folder / "config.json", ck.official_config())
        self.write(folder)
        return folder

    def write(self, folder, module=QUERY, sides="AB", columns=ck.D, settings=None, **more):
        shapes = {"A": (2, columns), "B": (ck.D, 2)}
        factors = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(shapes[side]) for side in sides}
        torch.save(factors | more, folder / "adapter_model.bin")
        ck.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 2} | (settings or {}))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"module": "model.layers.9.q_proj"}, r"adapts model\.layers\.9\.q_proj, which the base does not have"),
            ({"columns": 7}, r"do not fit the base's \[48, 48\]"),
            ({"sides": "B"}, r"expected lora_A and lora_B.*got lora_B only"),
            ({"x.lora_magnitude_vector": torch.ones(1)}, r"lora_magnitude_vector is neither"),
            ({"settings": {"use_dora": True}}, r"expected plain LoRA, got use_dora"),
            ({"settings": {"peft_type": "IA3"}}, r"expected plain LoRA, got peft_type 'IA3'"),
            ({"settings": {"lora_alpha": "x"}}, r"^SRC: adapter_config\.json: expected valid values"),
            ({"settings": {"alpha_pattern": {"(": 2}}}, r"^SRC: adapter_config\.json: expected valid values"),
        ]
        + [
            ({"settings": {"init_lora_weights": start}}, rf"init_lora_weights '{start}'.* merge the adapter with PEFT")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")
        ],
    )
    def test_adapters(self, refused, lora, src, dst, change, match):
        self.write(lora, **change)
        refused(match, lora, dst, base=src)

    def test_without_base_or_weights(self, refused, lora, src, dst):
        refused(r"^--base: SRC is a LoRA adapter.*name the folder", lora, dst)
        (lora / "adapter_model.bin").unlink()
        refused(r"expected adapter_model\.safetensors or adapter_model\.bin", lora, dst, base=src)

    def test_a_projector_alone(self, refused, tmp_path, src, dst):
        pretrain = tmp_path / "pretrain"
        pretrain.mkdir()
        torch.save(ck.make_projector() | {EMBEDDINGS: torch.ones(1)}, pretrain / "mm_projector.bin")
        refused(r"^--base: SRC is mm_projector\.bin alone", pretrain, dst)
        refused(r"expected the tensors of mm_projector.*got model\.embed_tokens", pretrain, dst, base=src)

    def test_base_with_a_whole_checkpoint(self, refused, src, dst):
        refused(r"^--base: SRC is a whole checkpoint", src, dst, base=src)


def test_a_tokenizer_that_splits_the_image_token(monkeypatch):
    """Without one the ids are those behind the last row."""
    assert settle_vocabulary(None, 62) == (64, 62, 63)
    tokenizer = build.tokenizer()
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: [7, 8])
    with pytest.raises(ConversionError, match=r"tokenizer: expected ids below 16, .* got 16"):
        settle_vocabulary(tokenizer, 16)
    with pytest.raises(ConversionError, match=r"tokenizer: expected <image> to be one token .* got \[7, 8\]"):
        settle_vocabulary(tokenizer, 64)


@pytest.mark.parametrize("convert", [convert_official, convert_llava])
def test_what_no_check_foresaw(convert, dst):
    with pytest.raises(
        ConversionError, match=r"^SRC: expected valid values, got TypeError: .*; get the checkpoint again$"
    ):
        convert(object(), dst)
