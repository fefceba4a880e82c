"""Broken if this fails: config.json does not say what blocks, window, tokens and element order the model has."""

import json

import pytest

from llava_integration import LlavaStfConfig
from tests.llava import build


def make(**changes):
    return LlavaStfConfig(**build.options(**changes))


def test_defaults_are_the_paper_model():
    config = LlavaStfConfig()
    assert config.vision_feature_layer == [23, 21, 18, 15, 12, 9, 6, 3]
    assert (config.spatial_merge_size, config.image_seq_length) == (2, 144)
    assert (config.mbtf_hidden_size, config.stf_hidden_size) == (4096, 16384)
    assert (config.feature_order, config.use_mbtf) == ("patch_major", True)


@pytest.mark.parametrize(("given", "layers"), [([-2, 3, -7], [5, 3, 0]), (-1, [6])])
def test_layers_are_a_list_of_positive_numbers(given, layers):
    assert make(vision_feature_layer=given).vision_feature_layer == layers


def test_round_trip_through_json_keeps_everything(tmp_path):
    sizes = {"spatial_merge_size": 4, "mbtf_hidden_size": 96, "stf_hidden_size": 40, "vision_feature_layer": [-2, 1]}
    config = make(**sizes, projector_hidden_act="silu", multimodal_projector_bias=False)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["feature_order"], stored["image_seq_length"]) == ("patch_major", 1)
    ours, theirs = config.to_dict(), LlavaStfConfig.from_pretrained(tmp_path).to_dict()
    assert ours == theirs | {"architectures": ours["architectures"]}


@pytest.mark.parametrize(("tower", "strategy"), [(build.clip, "default"), (build.siglip, "full")])
def test_the_select_strategy_follows_the_tower(tower, strategy):
    assert make(vision=tower(), vision_feature_layer=[2]).vision_feature_select_strategy == strategy


def test_truncation_only_when_asked():
    options = {"vision": build.clip(image_size=70), "vision_feature_layer": [5]}  # 5x5
    assert make(**options, spatial_merge_truncate=True).image_seq_length == 4
    with pytest.raises(ValueError, match="does not divide the 5x5 grid"):
        make(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [7]}, r"vision_feature_layer: expected layers from -7 to 6 .* got 7"),
        ({"vision_feature_layer": [3, -8]}, r"vision_feature_layer: .* got -8"),
        ({"vision_feature_layer": []}, r"vision_feature_layer: expected at least one"),
        ({"image_seq_length": 16}, r"image_seq_length: expected 4 for a 4x4 grid .* got 16"),
        ({"spatial_merge_size": 3}, r"spatial_merge_size: 3 does not divide the 4x4 grid"),
        ({"spatial_merge_size": 5}, r"spatial_merge_size: expected 1 to 4"),
        ({"spatial_merge_size": 0}, r"spatial_merge_size: expected 1 to 4"),
        ({"feature_order": "channel_major"}, r"feature_order: expected 'patch_major'.*channel_to_patch_major"),
        ({"projector_hidden_act": "relu"}, r"projector_hidden_act: expected one of .* got 'relu'"),
        ({"use_mbtf": False}, r"vision_feature_layer: expected one layer with use_mbtf=False, got \[5, 3\]"),
        ({"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy: expected 'default'"),
        (
            {"vision": build.siglip(), "vision_feature_select_strategy": "default"},
            r"expected 'full' for a siglip_vision_model tower, which has no CLS",
        ),
        (
            {"vision": {"model_type": "vit", "num_hidden_layers": 6}},
            r"vision_config: expected one of the towers .* got 'vit'",
        ),
        ({"mbtf_hidden_size": 0}, r"mbtf_hidden_size: expected a positive width, got 0"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{"vision_feature_layer": [5, 3]} | changes)
