"""Broken if this fails: some mode of generate gives other tokens, or an image reaches another prompt or beam."""

import functools
import inspect

import pytest
import torch
from transformers import LlavaModel

from tests.llava import build


class TestGenerate:
    """Fused and reference projector give the same tokens in every mode."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
            {"cache_implementation": "static"},
        ],
        ids=lambda options: "-".join(options) or "greedy",
    )
    def test_same_tokens_from_fused_and_reference(self, stf, monkeypatch, options):
        ids, mask = build.prompt([2, 1])
        ours = build.generate(stf, ids, mask, build.pixels(3), **options)
        assert ours.shape[1] == ids.shape[1] + 6
        other = build.with_reference(stf, monkeypatch)
        assert torch.equal(ours, build.generate(other, ids, mask, build.pixels(3), **options))

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
    def test_a_batch_gives_what_each_prompt_gives_alone(self, stf, options):
        """Left padding, and two, none and one image: images must reach their own prompt, in every beam."""
        counts, pixels = [2, 0, 1], build.pixels(3)
        ids, mask = build.prompt(counts)
        options = options | {"return_dict_in_generate": True, "output_scores": True}
        beams = options.get("num_beams", 1)
        batched = build.generate(stf, ids, mask, pixels, **options)
        start = 0
        for row, count in enumerate(counts):
            own = pixels[start : start + count] if count else None
            kept = mask[row] == 1
            alone = build.generate(stf, ids[row : row + 1, kept], mask[row : row + 1, kept], own, **options)
            assert torch.equal(batched.sequences[row, -6:], alone.sequences[0, -6:]), row
            for ours, theirs in zip(batched.scores, alone.scores, strict=True):
                assert torch.allclose(ours[row * beams : (row + 1) * beams], theirs, atol=1e-9), row
            start += count

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
    def test_every_beam_sees_the_images_in_order(self, stf, options):
        ids, mask = build.prompt([2, 0, 1])
        options = options | {"return_dict_in_generate": True, "output_logits": True}
        out = build.generate(stf, ids, mask, build.pixels(3), **options)
        first = out.logits[0].unflatten(0, (3, 3))
        expected = build.run(stf, ids, build.pixels(3), mask).logits[:, -1]
        assert torch.allclose(first, expected[:, None].to(first).expand_as(first), atol=1e-6)

    @pytest.mark.parametrize("images", [1, 0])
    def test_a_second_turn_on_the_cache_of_the_first(self, stf, images):
        """The whole conversation as ids, and the pixels of the new turn only, as generate takes them with a cache."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2 + images)
        first = build.generate(stf, ids, mask, pixels[:2], return_dict_in_generate=True)
        turn = build.prompt([images])[0]
        both = torch.cat([first.sequences, turn], dim=1)
        mask = torch.ones_like(both)
        own = pixels[2:] if images else None
        second = build.generate(stf, both, mask, own, past_key_values=first.past_key_values)
        assert torch.equal(second, build.generate(stf, both, mask, pixels))

    @pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 5.0}, {"prompt_lookup_num_tokens": 3}, {}])
    def test_no_image_token_is_generated(self, stf, options):
        (ids, mask), pixels = build.prompt([2]), build.pixels(2)
        with torch.no_grad():
            stf.lm_head.weight[build.IMAGE_TOKEN] *= 100
        out = build.generate(stf, ids, mask, pixels, max_new_tokens=20, **options)
        assert not (out[:, ids.shape[1] :] == build.IMAGE_TOKEN).any()

    @pytest.mark.parametrize("images", [[2], [0]], ids=str)
    @pytest.mark.parametrize("draft", ["self", "copy"])
    def test_assisted_by_a_draft_model_that_sees_the_images(self, stf, images, draft):
        """A draft model with the same weights guesses right every time: one pass of the model for all its tokens."""
        ids, mask = build.prompt(images)
        pixels = build.pixels(2) if images[0] else None
        plain = build.generate(stf, ids, mask, pixels)
        assistant, passes = build.stf() if draft == "copy" else stf, []
        options = {"num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
        assistant.generation_config.update(assistant_confidence_threshold=0.0, **options)
        stf.model.language_model.register_forward_hook(lambda *_: passes.append(1))
        assert torch.equal(build.generate(stf, ids, mask, pixels, assistant_model=assistant), plain)
        if draft == "copy":
            assert len(passes) <= 2

    @pytest.mark.parametrize("size", [1, 3, 7, 12, 17])
    def test_prefill_in_chunks_that_cut_images(self, stf, size):
        """Where transformers passes encoded images on, chunk by chunk; before that it repeats them: refused."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2)
        expected = build.generate(stf, ids, mask, pixels)
        chunked = functools.partial(build.generate, stf, ids, mask, pixels, prefill_chunk_size=size)
        if "mm_encoder_outputs" in inspect.signature(LlavaModel.forward).parameters or size >= ids.shape[1]:
            assert torch.equal(chunked(), expected)
        else:
            with pytest.raises(ValueError, match=r"image tokens .* 8 are needed"):
                chunked()

    def test_the_cache_changes_nothing(self, stf):
        """Without one every step is the whole forward, images and all."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2)
        options = {"suppress_tokens": [build.IMAGE_TOKEN]}
        found = [build.generate(stf, ids, mask, pixels, use_cache=use, **options) for use in (True, False)]
        assert torch.equal(*found)
