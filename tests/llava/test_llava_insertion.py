"""Broken if this fails: image features land on other rows than the image tokens', or in what the caller owns."""

import pytest
import torch

from llava_integration.core.insertion import image_rows
from tests.llava import build


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
