"""Broken if this fails: images, options or counts that do not fit run all the same, or end in a riddle."""

import pytest
import torch

from tests.llava import build


@pytest.mark.parametrize("path", ["in place", "plain"])
@pytest.mark.parametrize(
    ("images", "per_image", "found", "needed"),
    [([2], 4, 8, 4), ([1], 4, 4, 8), ([0], 4, 0, 4), ([1], 16, 16, 4)],
    ids=["more", "fewer", "none", "of the stock processor"],
)
def test_counts_that_do_not_match(stf, images, per_image, found, needed, path):
    ids, _ = build.prompt(images, per_image)
    pixels, ran = build.pixels(needed // 4), []
    stf.model.vision_tower.embeddings.register_forward_hook(lambda *_: ran.append(1))
    stf.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=rf"^Image features and image tokens do not match.* {needed} are needed"):
        build.run(stf, ids, pixels, grad=path == "plain")
    assert not ran, "something ran before the check"


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_counts_that_do_not_match(stf, beams):
    ids, mask = build.prompt([2])
    with pytest.raises(ValueError, match="found 8 image tokens"):
        build.generate(stf, ids, mask, build.pixels(1), num_beams=beams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_sizes": torch.tensor([[56, 56]])}, "image_sizes: expected None"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: expected 'default'"),
        ({"vision_feature_layer": [5, 3]}, "vision_feature_layer: expected 3 layers"),
        ({"vision_feature_layer": [5, 3, 9]}, "vision_feature_layer: expected layers from -7 to 6"),
        ({"inputs_embeds": torch.zeros(1, 4, 48)}, "input_ids, inputs_embeds: expected exactly one of them, got both"),
        ({"input_ids": None}, "input_ids, inputs_embeds: expected exactly one of them, got none"),
        ({"pixel_values": build.pixels(0)}, "found 4 image tokens .* 0 are needed"),
        ({"pixel_values": build.pixels(3)[0]}, r"pixel_values: expected \[images, 3, 56, 56\], got \[3, 56, 56\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(stf, options, message):
    options = {"input_ids": build.prompt([1])[0], "pixel_values": build.pixels(1)} | options
    with pytest.raises(ValueError, match=message):
        stf(**options)


def test_what_get_image_features_does_not_take(stf):
    with pytest.raises(ValueError, match="interpolate_pos_encoding: expected False, every image has the grid"):
        stf.get_image_features(build.pixels(1), interpolate_pos_encoding=True)
    for pixels, got in ((build.pixels(1).numpy(), "numpy.ndarray"), (build.pixels(1).byte(), "torch.uint8")):
        with pytest.raises(TypeError, match=f"pixel_values: expected a floating-point tensor .* got {got}; .*scales"):
            stf(input_ids=build.prompt([1])[0], pixel_values=pixels)
    with pytest.raises(TypeError, match="must be Tensor, not list"):  # torch's own sentence, as in the stock model
        stf(input_ids=build.prompt([1])[0].tolist(), pixel_values=build.pixels(1))


def test_image_tokens_that_the_stock_model_takes(stf):
    """Without pixels they are tokens like any other; with pixels it is the whole batch's count that matters."""
    ids, mask = build.prompt([2, 1])
    assert torch.isfinite(build.run(stf, ids, None, mask).logits).all()
    moved = ids.flatten().sort(descending=True).values.reshape(ids.shape)  # as many, in other rows
    assert (moved == build.IMAGE_TOKEN).sum(1).tolist() != (ids == build.IMAGE_TOKEN).sum(1).tolist()
    assert torch.isfinite(build.run(stf, moved, build.pixels(3)).logits).all()
    with pytest.raises(ValueError, match=r"found 12 image tokens \(id 4; \[8, 4\] in the rows\), but 8 are needed"):
        build.run(stf, ids, build.pixels(2))


def test_pixels_and_encoded_images(stf):
    pixels = build.pixels(1)
    encoded = {"image": stf.get_image_features(pixel_values=pixels)}
    with pytest.raises(ValueError, match="pixel_values, mm_encoder_outputs: expected at most one"):
        stf.model(input_ids=build.prompt([1])[0], pixel_values=pixels, mm_encoder_outputs=encoded)


@pytest.mark.parametrize(("layers", "message"), [([5, 99, 1], "expected layers from"), ([5], "expected 3 layers")])
def test_layers_that_somebody_changed_in_the_list(stf, layers, message):
    stf.config.vision_feature_layer[:] = layers
    with pytest.raises(ValueError, match=f"vision_feature_layer: {message}"):
        stf(input_ids=build.prompt([1])[0], pixel_values=build.pixels(1))


def test_another_layer_may_be_asked_for(stf):
    pixels = build.pixels(1)
    one, other = stf.model.project_images(pixels, [5, 3, 1]), stf.model.project_images(pixels, [-2, 3, 2])
    assert torch.equal(one, stf.model.project_images(pixels))
    assert not torch.allclose(one, other)
