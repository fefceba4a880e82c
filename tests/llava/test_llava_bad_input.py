"""Broken if this fails: images, options or counts that do not fit run all the same, or end in a riddle."""

import pytest
import torch


class TestBadInput:
    """What does not fit is named before anything runs."""

    @pytest.mark.parametrize("path", ["in place", "plain"])
    @pytest.mark.parametrize(("images", "found", "needed"), [([2], 8, 4), ([1], 4, 8), ([0], 0, 4)])
    def test_counts_that_do_not_match(self, build, stf, images, found, needed, path):
        ids, _ = build.prompt(images)
        ran = []
        stf.model.vision_tower.embeddings.register_forward_hook(lambda *_: ran.append(1))
        stf.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError, match=rf"found {found} image tokens .* {needed} are needed.*LlavaStfProcessor"):
            build.run(stf, ids, build.pixels(needed // 4), grad=path == "plain")
        assert not ran, "something ran before the check"

    def test_a_prompt_of_the_stock_processor(self, build, stf):
        ids, _ = build.prompt([1], per_image=16)
        with pytest.raises(ValueError, match=r"found 16 image tokens .* 4 are needed for 1 image"):
            build.generate(stf, ids, torch.ones_like(ids), build.pixels(1))

    def test_images_that_were_forgotten(self, build, stf):
        with pytest.raises(ValueError, match=r"found 4 image tokens .* 0 are needed"):
            build.run(stf, build.prompt([1])[0], None)

    def test_beams_with_counts_that_do_not_match(self, build, stf):
        ids, mask = build.prompt([2])
        with pytest.raises(ValueError, match="found 8 image tokens"):
            build.generate(stf, ids, mask, build.pixels(1), num_beams=2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_sizes": torch.tensor([[56, 56]])}, "image_sizes: expected None"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: expected 'default'"),
            ({"vision_feature_layer": [5, 3]}, "vision_feature_layer: expected 3 layers"),
            ({"vision_feature_layer": [5, 3, 9]}, "vision_feature_layer: expected layers from -7 to 6"),
            (
                {"inputs_embeds": torch.zeros(1, 4, 48)},
                "input_ids, inputs_embeds: expected exactly one of them, got both",
            ),
            ({"input_ids": None}, "input_ids, inputs_embeds: expected exactly one of them, got none"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_options(self, build, stf, options, message):
        options = {"input_ids": build.prompt([1])[0], "pixel_values": build.pixels(1)} | options
        with pytest.raises(ValueError, match=message):
            stf(**options)

    def test_pixels_and_encoded_images(self, build, stf):
        pixels = build.pixels(1)
        encoded = {"image": stf.get_image_features(pixel_values=pixels)}
        with pytest.raises(ValueError, match="pixel_values, mm_encoder_outputs: expected at most one"):
            stf.model(input_ids=build.prompt([1])[0], pixel_values=pixels, mm_encoder_outputs=encoded)

    def test_no_image_at_all(self, build, stf):
        with pytest.raises(ValueError, match="pixel_values: expected at least one image or None, got no image"):
            build.run(stf, build.prompt([0])[0], build.pixels(0))

    def test_another_layer_may_be_asked_for(self, build, stf):
        pixels = build.pixels(1)
        one = stf.model.project_images(pixels, [5, 3, 1])
        other = stf.model.project_images(pixels, [-2, 3, 2])
        assert torch.equal(one, stf.model.project_images(pixels))
        assert not torch.allclose(one, other)
