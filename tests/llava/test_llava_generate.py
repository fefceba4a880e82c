"""Broken if this fails: some mode of generate gives other tokens, or an image reaches another prompt or beam."""

import functools
import inspect

import pytest
import torch
from transformers import LlavaModel


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
            {"use_cache": False},
        ],
        ids=lambda options: "-".join(options) or "greedy",
    )
    def test_same_tokens_from_fused_and_reference(self, build, stf, monkeypatch, options):
        ids, mask = build.prompt([2, 1])
        options = dict(options)
        ours = build.generate(stf, ids, mask, build.pixels(3), **options)
        assert ours.shape[1] == ids.shape[1] + 6
        assert torch.equal(
            ours, build.generate(build.with_reference(stf, monkeypatch), ids, mask, build.pixels(3), **options)
        )

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
    def test_a_batch_gives_what_each_prompt_gives_alone(self, build, stf, options):
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
    def test_every_beam_sees_the_images_in_order(self, build, stf, options):
        ids, mask = build.prompt([2, 0, 1])
        out = build.generate(
            stf, ids, mask, build.pixels(3), return_dict_in_generate=True, output_logits=True, **options
        )
        first = out.logits[0].unflatten(0, (3, 3))
        expected = build.run(stf, ids, build.pixels(3), mask).logits[:, -1]
        assert torch.allclose(first, expected[:, None].to(first).expand_as(first), atol=1e-6)

    @pytest.mark.parametrize("images", [1, 0])
    def test_a_second_turn_on_the_cache_of_the_first(self, build, stf, images):
        """The whole conversation as ids, and the pixels of the new turn only, as generate takes them with a cache."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2 + images)
        first = build.generate(stf, ids, mask, pixels[:2], return_dict_in_generate=True)
        turn = build.prompt([images])[0]
        both = torch.cat([first.sequences, turn], dim=1)
        mask = torch.ones_like(both)
        own = pixels[2:] if images else None
        second = build.generate(stf, both, mask, own, past_key_values=first.past_key_values)
        assert torch.equal(second, build.generate(stf, both, mask, pixels))

    @pytest.mark.parametrize("images", [[2], [0]], ids=str)
    @pytest.mark.parametrize("draft", ["self", "copy"])
    def test_assisted_by_a_draft_model_that_sees_the_images(self, build, stf, images, draft):
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
    def test_prefill_in_chunks_that_cut_images(self, build, stf, size):
        """Where transformers passes encoded images on, chunk by chunk; before that it repeats them: refused."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2)
        expected = build.generate(stf, ids, mask, pixels)
        chunked = functools.partial(build.generate, stf, ids, mask, pixels, prefill_chunk_size=size)
        if "mm_encoder_outputs" in inspect.signature(LlavaModel.forward).parameters or size >= ids.shape[1]:
            assert torch.equal(chunked(), expected)
        else:
            with pytest.raises(ValueError, match=r"image tokens .* 8 are needed for 2 image\(s\)"):
                chunked()

    def test_greedy_by_hand(self, build, stf):
        ids, mask = build.prompt([2])
        pixels, tokens = build.pixels(2), []
        grown = ids
        for _ in range(6):
            logits = build.run(stf, grown, pixels).logits[:, -1]
            logits[:, [3, build.image_token]] = -torch.inf
            tokens.append(logits.argmax(-1, keepdim=True))
            grown = torch.cat([grown, tokens[-1]], dim=1)
        expected = build.generate(stf, ids, mask, pixels, suppress_tokens=[3, build.image_token])[:, -6:]
        assert torch.equal(torch.cat(tokens, dim=1), expected)

    def test_the_image_matters(self, build, stf):
        ids, _ = build.prompt([1])
        one, other = (build.run(stf, ids, p).logits[:, -1] for p in build.pixels(2).split(1))
        assert (one - other).abs().max() > 1e-3

    def test_text_only(self, build, stf):
        ids, mask = build.prompt([0, 0], length=5)
        assert build.generate(stf, ids, mask, None).shape == (2, 11)
