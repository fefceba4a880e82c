"""Broken if this fails: an adapter, a projector alone or a tokenizer is taken though it does not fit its base."""

import json

import pytest
import torch

from tests.convert import checkpoints as ck


class TestTokenizer:
    def test_without_room_for_the_image_token(self, refused, src, dst):
        ck.make_tokenizer([*ck.SPECIAL, *(f"w{i}" for i in range(ck.ROWS))]).save_pretrained(src)
        refused(r"^tokenizer: expected ids below 40.*got 42; there is no room for <image>", src, dst)

    def test_that_is_none(self, refused, src, dst):
        (src / "tokenizer.json").write_text("{}")
        refused(r"tokenizer\.json: expected a tokenizer", src, dst)

    def test_settings_of_another_type(self, refused, src, dst):
        settings = json.loads((src / "tokenizer_config.json").read_text())
        ck.write_json(src / "tokenizer_config.json", settings | {"model_max_length": []})
        refused(r"tokenizer\.json: expected a tokenizer", src, dst)

    def test_model_file_that_is_none(self, refused, src, dst):
        (src / "tokenizer.json").unlink()
        (src / "tokenizer.model").write_bytes(b"\xff" * 50)
        refused(r"tokenizer\.model: expected a byte-pair model of sentencepiece", src, dst)


class TestLora:
    @pytest.fixture
    def lora(self, tmp_path, src):
        folder = tmp_path / "lora"
        folder.mkdir()
        ck.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 2})
        ck.write_json(folder / "config.json", ck.official_config())
        self.write(folder, "model.layers.0.self_attn.q_proj")
        return folder

    def write(self, folder, module, sides="AB", columns=ck.D, **more):
        shapes = {"A": (2, columns), "B": (ck.D, 2)}
        factors = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(shapes[side]) for side in sides}
        torch.save(factors | more, folder / "adapter_model.bin")

    def test_without_base(self, refused, lora, dst):
        refused(r"^--base: SRC is a LoRA adapter.*name the folder", lora, dst)

    def test_base_that_does_not_fit(self, refused, lora, src, dst):
        self.write(lora, "model.layers.9.self_attn.q_proj")
        refused(r"adapts model\.layers\.9\.self_attn\.q_proj, which the base does not have", lora, dst, base=src)
        self.write(lora, "model.layers.0.self_attn.q_proj", columns=7)
        refused(r"do not fit the base's \[48, 48\]", lora, dst, base=src)

    def test_one_factor(self, refused, lora, src, dst):
        self.write(lora, "model.layers.0.self_attn.q_proj", "B")
        refused(r"expected lora_A and lora_B.*got lora_B only", lora, dst, base=src)

    def test_other_adapters(self, refused, lora, src, dst):
        self.write(
            lora, "model.layers.0.self_attn.q_proj", **{"base_model.model.x.lora_magnitude_vector": torch.ones(1)}
        )
        refused(r"lora_magnitude_vector is neither", lora, dst, base=src)
        ck.write_json(lora / "adapter_config.json", {"peft_type": "LORA", "use_dora": True})
        refused(r"expected plain LoRA, got use_dora", lora, dst, base=src)
        ck.write_json(lora / "adapter_config.json", {"peft_type": "IA3"})
        refused(r"expected plain LoRA, got peft_type 'IA3'", lora, dst, base=src)

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
    def test_factors_that_hold_a_part_of_the_base(self, refused, lora, src, dst, start):
        ck.write_json(lora / "adapter_config.json", {"peft_type": "LORA", "init_lora_weights": start})
        self.write(lora, "model.layers.0.self_attn.q_proj")
        refused(
            rf"expected plain LoRA, got init_lora_weights '{start}'.* merge the adapter with PEFT", lora, dst, base=src
        )

    @pytest.mark.parametrize(
        "changes", [{"lora_alpha": "x"}, {"alpha_pattern": {"(": 2}}, {"alpha_pattern": [1]}], ids=str
    )
    def test_settings_of_another_type(self, refused, lora, src, dst, changes):
        ck.write_json(lora / "adapter_config.json", {"peft_type": "LORA"} | changes)
        refused(r"^SRC: adapter_config\.json: expected valid values", lora, dst, base=src)

    def test_no_weights(self, refused, lora, src, dst):
        (lora / "adapter_model.bin").unlink()
        refused(r"expected adapter_model\.safetensors or adapter_model\.bin", lora, dst, base=src)


class TestPretrain:
    def test_without_base(self, refused, tmp_path, dst):
        src = tmp_path / "pretrain"
        src.mkdir()
        torch.save(ck.make_projector(), src / "mm_projector.bin")
        refused(r"^--base: SRC is mm_projector\.bin alone", src, dst)

    def test_foreign_tensors(self, refused, tmp_path, src, dst):
        pretrain = tmp_path / "pretrain"
        pretrain.mkdir()
        torch.save(ck.make_projector() | {"model.embed_tokens.weight": torch.ones(1)}, pretrain / "mm_projector.bin")
        refused(r"expected the tensors of mm_projector.*got model\.embed_tokens", pretrain, dst, base=src)

    def test_base_with_a_whole_checkpoint(self, refused, src, dst):
        refused(r"^--base: SRC is a whole checkpoint", src, dst, base=src)
