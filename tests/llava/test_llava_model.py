"""Broken if this fails: LLaVA-STF is not its definition, for some tower, window or half of the projector."""

import functools

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import reference
from tests.llava import build


def test_image_features_from_the_definition(stf):
    """Concatenate the stock tower's hidden states, run the reference projector, compare."""
    pixels = build.pixels(2)
    config, projector = stf.config, stf.model.multi_modal_projector
    oracle = reference.CompactTokenProjector(3, 32, 48, skip_tokens=1, dtype=torch.float64)
    oracle.load_state_dict(projector.state_dict())
    with torch.no_grad():
        hidden = stf.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = oracle([hidden[i] for i in config.vision_feature_layer], (4, 4))
        got = torch.stack(list(stf.get_image_features(pixel_values=pixels).pooler_output))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


class TestImageFeatures:
    """What get_image_features gives besides the tokens is what the stock one gives, from the same tower."""

    @pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
    def test_the_output_of_the_tower(self, options):
        stock, stf = build.stock(vision_feature_layer=[5, 3, 1]), build.stf()
        for model in (stock, stf):
            model.set_attn_implementation("eager")
        stf.model.vision_tower = stock.model.vision_tower
        with torch.no_grad():
            ours, theirs = (model.get_image_features(build.pixels(2), **options) for model in (stf, stock))
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
        for name in ("hidden_states", "attentions"):
            pairs = zip(ours.get(name) or (), theirs.get(name) or (), strict=True)
            assert all(one is other or torch.equal(one, other) for one, other in pairs)
        assert len(stf.get_image_features(build.pixels(2), return_dict=False)) == 3

    @pytest.mark.parametrize("where", ["instance", "class", "subclass"])
    @pytest.mark.parametrize("way", ["forward", "in place", "generate"])
    def test_whoever_replaces_it_is_asked(self, stf, monkeypatch, where, way):
        ids, mask = build.prompt([2])
        cls, asked = type(stf.model), []

        def zeros(self, pixel_values, **options):
            assert "whole_tower" not in options
            asked.append(len(pixel_values))
            return BaseModelOutputWithPooling(pooler_output=[torch.zeros(4, 48).double() for _ in pixel_values])

        if where == "instance":
            monkeypatch.setattr(stf.model, "get_image_features", functools.partial(zeros, stf.model))
        elif where == "class":
            monkeypatch.setattr(cls, "get_image_features", zeros)
        else:
            stf.model.__class__ = type("Other", (cls,), {"get_image_features": zeros})
        if way == "generate":
            build.generate(stf, ids, mask, build.pixels(2))
        else:
            out = build.run(stf, ids, build.pixels(2), grad=way == "forward")
            assert all(not tokens.any() for tokens in out.image_hidden_states)
        assert asked == [2]


def test_blocks_are_views_of_the_hidden_states(stf):
    """No concatenation and no crop: the projector receives the hidden states themselves, CLS included."""
    seen = []
    stf.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    layer_outputs = [None]
    for layer in stf.model.vision_tower.encoder.layers[:5]:
        layer.register_forward_hook(lambda module, args, output: layer_outputs.append(output))
    build.run(stf, build.prompt([1])[0], build.pixels(1))
    assert [block is layer_outputs[i] for block, i in zip(seen, [5, 3, 1], strict=True)] == [True] * 3


class TestGeometries:
    """Other towers, windows and halves of the projector that the paper compares."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"spatial_merge_size": 1},
            {"spatial_merge_size": 4},
            {"spatial_merge_size": 3, "spatial_merge_truncate": True},
            {"vision_feature_layer": [6]},
            {"vision_feature_layer": [4], "use_mbtf": False},
            {"vision_feature_layer": [0, 6, 2, 2]},
            {"multimodal_projector_bias": False},
            {"projector_hidden_act": "silu", "mbtf_hidden_size": 40, "stf_hidden_size": 24},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("tower", ["clip", "siglip"])
    def test_runs_equals_the_reference_and_comes_back_from_its_folder(self, monkeypatch, tmp_path, tower, changes):
        vision = getattr(build, tower)(num_hidden_layers=6)
        stf = build.stf(vision=vision, **changes)
        per_image = stf.config.image_seq_length
        assert per_image == (4 // stf.config.spatial_merge_size) ** 2
        ids, mask = build.prompt([1, 2], per_image)
        stf.save_pretrained(tmp_path)
        loaded = build.load(tmp_path)
        assert build.same_state(loaded, stf)
        expected = build.run(build.with_reference(stf, monkeypatch), ids, build.pixels(3), mask).logits
        for model in (stf, loaded):
            assert torch.allclose(build.run(model, ids, build.pixels(3), mask).logits, expected, atol=1e-10)
