"""Broken if this fails: tensors or settings that no LLaVA-STF has are converted, or refused without their name."""

import pytest
import torch

from tests.convert import checkpoints as ck


class TestForeign:
    def test_an_unknown_tensor(self, refused, src, dst):
        ck.rewrite(src, lambda tensors: tensors.update({"model.image_newline": torch.ones(ck.D)}))
        refused(r"^SRC: 1 tensors are left over: model\.image_newline", src, dst)

    def test_a_third_linear_in_the_projector(self, refused, src, dst):
        ck.rewrite(src, lambda tensors: tensors.update({"model.mm_projector.4.weight": torch.ones(ck.D, ck.D)}))
        refused(r"left over: model\.mm_projector\.4\.weight", src, dst)

    def test_a_language_model_alone(self, refused, src, dst):
        (src / "pytorch_model.bin.index.json").unlink()
        ck.write_bin(src, ck.official_tensors(None, ck.make_language(), {}))
        refused(r"expected an official LLaVA-STF checkpoint with mm_projector.*got tensors such as", src, dst)

    def test_llava_without_stf(self, refused, src, dst):
        def change(tensors):
            for name in [name for name in tensors if "crosslayer" in name]:
                tensors.pop(name)
            tensors["model.mm_projector.0.weight"] = torch.randn(ck.D, ck.C)

        ck.rewrite(src, change)
        refused(r"so this is LLaVA-1\.5, not LLaVA-STF", src, dst)

    def test_a_folder_of_transformers(self, refused, stock, dst):
        refused(r"config\.json|mm_vision_tower", stock[0], dst)

    def test_a_shape(self, refused, src, dst):
        ck.rewrite(src, lambda tensors: tensors.update({"model.norm.weight": torch.ones(ck.D + 1)}))
        refused(r"model\.norm\.weight in pytorch_model\.bin: expected shape \[48\].*got \[49\]", src, dst)

    @pytest.mark.parametrize(("value", "got"), [(torch.tensor(1.0), r"shape \[\]"), (None, "none")], ids=str)
    def test_embeddings(self, refused, src, dst, value, got):
        name = "model.embed_tokens.weight"
        ck.rewrite(src, lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value}))
        refused(rf"^SRC: model\.embed_tokens\.weight: expected a matrix .*, got {got}", src, dst)

    def test_quantized_weights(self, refused, src, dst):
        name = "model.layers.0.mlp.up_proj.weight"
        ck.rewrite(src, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
        refused(r"up_proj\.weight in pytorch_model\.bin: expected float32, float16 or bfloat16", src, dst)

    def test_no_weights(self, refused, src, dst):
        (src / "pytorch_model.bin.index.json").unlink()
        refused(r"^SRC: expected one of model\.safetensors\.index\.json", src, dst)

    def test_no_config(self, refused, src, dst):
        (src / "config.json").unlink()
        refused(r"^SRC: expected config\.json", src, dst)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"mm_projector_type": "linear"}, "mm_projector_type: expected 'mlp2x_gelu', got 'linear'"),
            ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: expected 'pad' or 'square'"),
            ({"mm_hidden_size": 64}, "mm_hidden_size: expected 32"),
            ({"model_type": "llava_mpt"}, "expected model_type llava_llama, got 'llava_mpt'"),
            ({"mm_vision_tower": None}, "mm_vision_tower: expected a name, got None.*--vision-tower DIR"),
            ({"mm_vision_tower": "google/siglip"}, "neither a local folder nor one of.*--vision-tower DIR"),
            ({"num_hidden_layers": 3}, r"9 tensors are missing"),
            ({"num_hidden_layers": 1}, r"9 tensors are left over"),
            ({"mm_vision_select_layer": [99] * 8}, r"^SRC: config\.json: mm_vision_select_layer: .*got 99"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end: expected False, got True"),
            ({"num_hidden_layers": "two"}, "^SRC: config.json: .*num_hidden_layers.*'two'.*get the file again"),
            ({"num_attention_heads": 5}, r"^SRC: config\.json: .*attention heads \(5\)"),
            ({"num_attention_heads": 0}, r"^SRC: config\.json: "),
            ({"rope_scaling": [1]}, r"^SRC: config\.json: "),
            ({"rope_scaling": {"type": "nonsense"}}, r"^SRC: config\.json: .*nonsense"),
            ({"rope_theta": "big"}, r"^SRC: config\.json: "),
            ({"hidden_act": "nonsense"}, r"^SRC: config\.json: .*nonsense"),
            ({"bos_token_id": "a"}, r"^SRC: config\.json: .*bos_token_id"),
            ({"model_type": ["llava_llama"]}, "expected model_type llava_llama, got"),
            ({"mm_vision_tower": 5}, r"^SRC: config\.json: mm_vision_tower: expected a name, got 5"),
            ({"mm_vision_select_layer": -3}, r"^--blocks: the checkpoint does not name its 8 blocks"),
        ],
    )
    def test_configuration(self, refused, src, dst, changes, match):
        ck.write_json(src / "config.json", ck.official_config(**changes))
        refused(match, src, dst)

    @pytest.mark.parametrize(
        "vision",
        [[1], ck.VISION | {"hidden_size": "a"}, ck.VISION | {"patch_size": 0}, ck.VISION | {"patch_size": 100},
         ck.VISION | {"num_attention_heads": 7}],
        ids=lambda value: "list" if isinstance(value, list) else next(k for k in value if value[k] != ck.VISION[k]),
    )  # fmt: skip
    def test_configuration_of_the_tower(self, refused, src, dst, vision):
        ck.write_json(src.parent / "tower" / "config.json", {"model_type": "clip", "vision_config": vision})
        refused(r"tower/config\.json: expected valid values, got .*get the file again", src, dst)

    @pytest.mark.parametrize("blocks", [3, [], ["a"] * 8, [99, *ck.BLOCKS[1:]], ck.BLOCKS[:3]], ids=str)
    def test_blocks(self, refused, src, dst, blocks):
        refused(r"^--blocks: expected ", src, dst, blocks=blocks)

    @pytest.mark.parametrize("size", [0, -5, 2.5e9])
    def test_size_of_a_shard(self, refused, src, dst, size):
        refused(r"^max_shard_bytes: expected a positive int or None, got", src, dst, max_shard_bytes=size)

    @pytest.mark.parametrize(
        "settings",
        [{"size": "big"}, {"size": {"height": 1}}, {"image_mean": [1]}, {"resample": 99}, {"rescale_factor": "x"}],
        ids=str,
    )
    def test_settings_of_images(self, refused, src, dst, settings):
        ck.write_json(src / "preprocessor_config.json", settings)
        refused(r"^preprocessor_config\.json: expected valid values, got .*correct the file or remove it", src, dst)

    def test_the_towers_weights_are_nowhere(self, refused, src, dst):
        ck.rewrite(src, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
        refused(r"expected the weights of the vision tower tower in it, found none.*--vision-tower DIR", src, dst)

    def test_images_of_another_size(self, refused, src, dst):
        ck.write_json(src / "preprocessor_config.json", {"size": 28, "crop_size": 28})
        refused(r"preprocessor_config\.json: expected images of 56x56.*got 28x28", src, dst)


def test_values_that_float16_cannot_hold(refused, src, dst):
    ck.rewrite(src, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    refused(r"^--dtype: model\.language_model\.norm\.weight has values up to 1e\+05", src, dst, dtype=torch.float16)
