"""Broken if this fails: config.json does not say what blocks, window, tokens and element order the model has."""

import json

import pytest

from llava_integration import LlavaStfConfig


def test_defaults_are_the_paper_model():
    config = LlavaStfConfig()
    assert config.vision_feature_layer == [23, 21, 18, 15, 12, 9, 6, 3]
    assert (config.spatial_merge_size, config.image_seq_length) == (2, 144)
    assert (config.mbtf_hidden_size, config.stf_hidden_size) == (4096, 16384)
    assert (config.feature_order, config.use_mbtf) == ("patch_major", True)


def test_negative_layers_are_resolved_at_construction(build):
    config = LlavaStfConfig(vision_config=build.clip(), text_config=build.text(), vision_feature_layer=[-2, 3, -7])
    assert config.vision_feature_layer == [5, 3, 0]


def test_a_single_layer_is_a_list(build):
    config = LlavaStfConfig(vision_config=build.clip(), text_config=build.text(), vision_feature_layer=-1)
    assert config.vision_feature_layer == [6]


def test_round_trip_through_json_keeps_everything(build, tmp_path):
    config = LlavaStfConfig(
        vision_config=build.clip(),
        text_config=build.text(),
        vision_feature_layer=[-2, 1],
        spatial_merge_size=4,
        mbtf_hidden_size=96,
        stf_hidden_size=40,
        projector_hidden_act="silu",
        multimodal_projector_bias=False,
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["feature_order"] == "patch_major"
    assert stored["image_seq_length"] == 1
    loaded = LlavaStfConfig.from_pretrained(tmp_path)
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {k: v for k, v in ours.items() if k != "architectures"} == {
        k: theirs[k] for k in ours if k != "architectures"
    }


@pytest.mark.parametrize(("tower", "strategy"), [("clip", "default"), ("siglip", "full")])
def test_the_select_strategy_follows_the_tower(build, tower, strategy):
    vision = getattr(build, tower)()
    config = LlavaStfConfig(vision_config=vision, text_config=build.text(), vision_feature_layer=[2])
    assert config.vision_feature_select_strategy == strategy


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
        ({"mbtf_hidden_size": 0}, r"mbtf_hidden_size: expected a positive width, got 0"),
    ],
)
def test_contradictions_are_refused(build, changes, message):
    options = {"vision_config": build.clip(), "text_config": build.text(), "vision_feature_layer": [5, 3]}
    with pytest.raises(ValueError, match=message):
        LlavaStfConfig(**options | changes)


def test_siglip_has_no_cls_to_drop(build):
    with pytest.raises(ValueError, match=r"expected 'full' for a siglip_vision_model tower, which has no CLS"):
        LlavaStfConfig(
            vision_config=build.siglip(),
            text_config=build.text(),
            vision_feature_layer=[2],
            vision_feature_select_strategy="default",
        )


def test_an_unknown_tower_is_refused(build):
    with pytest.raises(ValueError, match=r"vision_config: expected one of the towers .* got 'vit'"):
        LlavaStfConfig(
            vision_config={"model_type": "vit", "num_hidden_layers": 4},
            text_config=build.text(),
            vision_feature_layer=[2],
        )


def test_truncation_only_when_asked(build):
    vision = build.clip(image_size=70)  # 5x5
    options = {"vision_config": vision, "text_config": build.text(), "vision_feature_layer": [5]}
    assert LlavaStfConfig(**options, spatial_merge_truncate=True).image_seq_length == 4
    with pytest.raises(ValueError, match="does not divide the 5x5 grid"):
        LlavaStfConfig(**options)
