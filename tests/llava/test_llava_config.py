"""Broken if this fails: config.json does not say what blocks, window, tokens and element order the model has."""

import json

import pytest
from transformers import AutoConfig, ViTConfig

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


def by_constructor(stored, changes, folder):
    return LlavaStfConfig(**{name: value for name, value in stored.items() if name != "image_seq_length"} | changes)


def by_dict(stored, changes, folder):
    return LlavaStfConfig.from_dict(stored, **changes)


def by_folder(stored, changes, folder):
    return AutoConfig.from_pretrained(folder, **changes)


def by_assignment(stored, changes, folder):
    config = LlavaStfConfig.from_dict(stored)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


WAYS_IN = [by_constructor, by_dict, by_folder, by_assignment]


@pytest.fixture
def stored(tmp_path):
    make(vision_feature_layer=[5, 3]).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("way", WAYS_IN)
class TestEveryWayIn:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"vision_feature_layer": [-1, -2, -3]}, {"vision_feature_layer": [6, 5, 4]}),
            ({"vision_feature_layer": -2}, {"vision_feature_layer": [5]}),
            ({"vision_feature_layer": (5, 4)}, {"vision_feature_layer": [5, 4]}),
            ({"vision_feature_layer": 5, "use_mbtf": False}, {"vision_feature_layer": [5], "use_mbtf": False}),
            ({"spatial_merge_size": 4}, {"image_seq_length": 1}),
            ({"spatial_merge_size": 4, "image_seq_length": 1}, {"image_seq_length": 1}),
            ({"image_seq_length": None}, {"image_seq_length": 4}),
            ({"vision_feature_select_strategy": None}, {"vision_feature_select_strategy": "default"}),
            ({"vision_config": build.clip(image_size=112)}, {"image_seq_length": 16}),
        ],
        ids=str,
    )
    def test_gives_the_same(self, stored, tmp_path, way, changes, expected):
        config = way(stored, changes, tmp_path)
        assert {name: getattr(config, name) for name in expected} == expected

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vision_feature_layer": [7]}, "vision_feature_layer: expected layers from -7 to 6 .* got 7"),
            ({"vision_feature_layer": [3, -8]}, "vision_feature_layer: .* got -8"),
            ({"vision_feature_layer": []}, "vision_feature_layer: expected at least one layer"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: expected 'default'"),
            ({"spatial_merge_size": 3}, "spatial_merge_size: 3 does not divide the 4x4 grid"),
            ({"spatial_merge_size": 5}, "spatial_merge_size: expected 1 to 4"),
            ({"spatial_merge_size": 0}, "spatial_merge_size: expected 1 to 4"),
            ({"projector_hidden_act": "relu"}, "projector_hidden_act: expected one of .* got 'relu'"),
            ({"mbtf_hidden_size": 0}, "mbtf_hidden_size: expected a positive width, got 0"),
            ({"image_seq_length": 16}, "image_seq_length: expected 4 for a 4x4 grid .* got 16"),
            ({"use_mbtf": False}, r"vision_feature_layer: expected one layer .* got \[5, 3\]"),
            ({"feature_order": "channel_major"}, "feature_order: expected 'patch_major'.*channel_to_patch_major"),
            ({"vision_config": build.siglip()}, "expected 'full' for a siglip_vision_model tower, which has no CLS"),
            ({"vision_config": ViTConfig()}, "vision_config: expected one of the towers .* got 'vit'"),
        ],
        ids=str,
    )
    def test_refuses_the_same(self, stored, tmp_path, way, changes, message):
        with pytest.raises(ValueError, match=message):
            way(stored, changes, tmp_path)


def test_a_refused_assignment_changes_nothing():
    config = make(vision_feature_layer=[5, 3])
    before = config.to_dict()
    with pytest.raises(ValueError, match="spatial_merge_size"):
        config.spatial_merge_size = 3
    assert config.to_dict() == before


def test_tokens_of_a_file_are_derived_anew_and_null_is_nothing(stored, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(stored | {"image_seq_length": 576, "quantization_config": None}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.image_seq_length == 4
    assert not hasattr(config, "quantization_config")


def test_keywords_change_the_tower_of_a_folder_together_with_the_window(stored, tmp_path):
    config = AutoConfig.from_pretrained(tmp_path, vision_config={"image_size": 84}, spatial_merge_size=3)
    assert (config.vision_config.image_size, config.vision_config.hidden_size) == (84, 32)
    assert config.image_seq_length == 4
    config = AutoConfig.from_pretrained(tmp_path, use_mbtf=False, vision_feature_layer=5)  # neither alone would do
    assert config.vision_feature_layer == [5]
