"""Broken if this fails: LLaVA-STF is not its definition, for some tower, window or half of the projector, with
stf_kernels or without; or image features land on other rows than the image tokens', or in what the caller owns."""

import functools

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import reference
from llava_integration.core import plain_projector
from llava_integration.core.insertion import image_rows
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


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("blocks", "skip", "mbtf"), [(3, 1, True), (1, 0, True), (1, 1, False)])
@pytest.mark.parametrize(("merge_size", "grid"), [(1, (3, 5)), (2, (4, 6)), (3, (7, 8))])
@pytest.mark.parametrize("bias", [True, False])
def test_the_plain_projector_equals_the_reference(activation, blocks, skip, mbtf, merge_size, grid, bias):
    sizes = {"merge_size": merge_size, "skip_tokens": skip, "mbtf": mbtf, "mbtf_hidden_dim": 24, "stf_hidden_dim": 40}
    options = sizes | {"activation": activation, "bias": bias, "truncate": True, "dtype": torch.float64}
    ours, theirs = (p.CompactTokenProjector(blocks, 8, 12, **options) for p in (plain_projector, reference))
    ours.load_state_dict(theirs.state_dict())
    states = [torch.randn(2, skip + grid[0] * grid[1], 8, dtype=torch.float64) for _ in range(blocks)]
    with torch.no_grad():
        got, expected = ours(states, grid), theirs(states, grid)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
        out, rows = torch.zeros(40, 12, dtype=torch.float64), torch.randperm(40)[: expected.shape[:2].numel()]
        assert ours(states, grid, out=out, rows=rows) is out
        assert torch.equal(out[rows], got.flatten(0, 1))


class TestInsertion:
    """The projector writes into inputs_embeds where nobody can tell, and only there."""

    def spy(self, model, monkeypatch):
        calls, original = [], type(model.model.multi_modal_projector).forward

        def forward(projector, *args, **kwargs):
            calls.append(kwargs.get("out") is not None)
            return original(projector, *args, **kwargs)

        monkeypatch.setattr(type(model.model.multi_modal_projector), "forward", forward)
        return calls

    def test_writing_in_place_equals_plain_insertion(self, stf, monkeypatch):
        ids, mask = build.prompt([2, 0, 1])
        pixels, calls = build.pixels(3), self.spy(stf, monkeypatch)
        weight = stf.get_input_embeddings().weight.clone()
        in_place, plain = build.run(stf, ids, pixels, mask), build.run(stf, ids, pixels, mask, grad=True)
        assert calls == [True, False]
        assert torch.equal(stf.get_input_embeddings().weight, weight), "the embeddings were written"
        assert torch.allclose(in_place.logits, plain.logits, rtol=0, atol=1e-12)
        assert torch.allclose(in_place.image_hidden_states, plain.image_hidden_states, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("why", ["register_forward_hook", "register_forward_pre_hook", "dtype", "autocast"])
    def test_otherwise_insertion_is_plain(self, monkeypatch, why):
        """A hook sees the projector as usual; another dtype, and autocast, would need a cast."""
        stf = build.stf(torch.float32)
        calls = self.spy(stf, monkeypatch)
        if why == "dtype":
            stf.model.language_model.double()
            stf.lm_head.double()
        elif why != "autocast":
            getattr(stf.model.multi_modal_projector, why)(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
            assert torch.isfinite(build.run(stf, build.prompt([1])[0], build.pixels(1, torch.float32)).logits).all()
        assert calls == [False]

    def test_rows_of_a_mask(self):
        mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
        assert image_rows(mask, 4).tolist() == [1, 3, 8, 9]
        assert image_rows(mask, 0).tolist() == []


def test_inputs_embeds_with_pixels(stf):
    ids, _ = build.prompt([2])
    pixels = build.pixels(2)
    with torch.no_grad():
        embeds = stf.get_input_embeddings()(ids)
        kept = embeds.clone()
        logits = stf(inputs_embeds=embeds, pixel_values=pixels).logits
    assert torch.allclose(logits, build.run(stf, ids, pixels).logits, atol=1e-12)
    assert torch.equal(embeds, kept), "the caller's inputs_embeds were written"


def test_encoded_images_may_be_passed_on(stf):
    ids, _ = build.prompt([2])
    pixels = build.pixels(2)
    with torch.no_grad():
        encoded = {"image": stf.get_image_features(pixel_values=pixels)}
        logits = stf.model(input_ids=ids, mm_encoder_outputs=encoded).last_hidden_state
        assert torch.allclose(logits, stf.model(input_ids=ids, pixel_values=pixels).last_hidden_state, atol=1e-12)
