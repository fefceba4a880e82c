"""Broken if this fails: prompts carry a number of image tokens that the model does not expect, or say so too late."""

import pytest
import torch
from transformers import CLIPImageProcessorPil, LlavaProcessor, SiglipImageProcessorPil

import llava_integration as li
from tests.llava import build


def frames(count, first=0):
    return [build.image(first + i) for i in range(count)]


def process(processor, text="<image> what is", **options):
    """(image tokens of each prompt, all that the processor made)."""
    inputs = processor(text=text, padding=True, return_tensors="pt", **options)
    return (inputs["input_ids"] == processor.image_token_id).sum(1).tolist(), inputs


@pytest.mark.parametrize(
    ("images", "options", "expected"),
    [
        (CLIPImageProcessorPil(**build.square(336)), {}, 144),  # the paper's model
        (CLIPImageProcessorPil(**build.square(56)), {"spatial_merge_size": 1}, 16),
        (CLIPImageProcessorPil(**build.square(56)), {}, 4),
        (CLIPImageProcessorPil(**build.square(56)), {"spatial_merge_size": 3}, 1),
        (CLIPImageProcessorPil(**build.square(56)), {"spatial_merge_size": 4}, 1),
        (SiglipImageProcessorPil(size={"height": 56, "width": 56}), {"vision_feature_select_strategy": "full"}, 4),
    ],
)
def test_tokens_of_an_image(images, options, expected):
    processor = li.LlavaStfProcessor(images, build.tokenizer(), **options)
    found, inputs = process(processor, images=build.image())
    assert found == [expected]
    assert inputs["pixel_values"].shape[0] == 1
    counted = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (500, 300)])
    assert counted["num_image_tokens"] == [expected] * 2


def test_what_it_writes_the_model_takes(stf, processor):
    texts = ["USER : <image> and <image> ASSISTANT :", "what is", "<image>"]
    found, inputs = process(processor, texts, images=frames(3))
    assert found == [8, 0, 4]
    assert inputs["attention_mask"][:, 0].tolist() == [1, 0, 0], "left padding"
    assert stf.float().generate(**inputs, max_new_tokens=2).shape[0] == 3


def test_images_nested_by_prompt(processor):
    found, inputs = process(processor, ["<image> <image>", "<image>"], images=[frames(2), frames(1, 2)])
    assert found == [8, 4]
    assert torch.equal(inputs["pixel_values"], processor(images=frames(3), return_tensors="pt")["pixel_values"])


def test_expanded_prompts_are_left_alone(processor):
    _, once = process(processor, "USER : <image> a cat", images=[build.image()])
    _, again = process(processor, "USER : " + "<image>" * 4 + " a cat", images=[build.image()])
    assert torch.equal(once["input_ids"], again["input_ids"])
    assert process(processor, ["<image>" * 4] * 2, images=frames(2))[0] == [4, 4]


def test_text_or_images_alone(processor):
    assert "pixel_values" not in processor(text="a cat", return_tensors="pt")
    assert "input_ids" not in processor(images=build.image(), return_tensors="pt")


class TestVideo:
    """T frames are T images' worth of tokens, in order, behind one placeholder, and the pixels that images have."""

    def test_frames_behind_one_placeholder(self, stf, processor):
        six = frames(6)
        found, video = process(processor, ["<image> a cat", "dog <image>"], videos=[six[:3], six[3:]])
        assert found == [12, 12]
        images = processor(images=six, return_tensors="pt")
        together = video["pixel_values_videos"].flatten(0, 1)
        assert torch.equal(together, images["pixel_values"]), "frames in order, two videos in order"
        assert stf.float().generate(**video, max_new_tokens=2).shape[0] == 2

    def test_the_model_sees_what_it_sees_in_as_many_images(self, stf, processor):
        four = frames(4)
        _, video = process(processor, "<image> a cat <image>", videos=[four[:2], four[2:]])
        images = processor(images=four, return_tensors="pt")
        ids = video["input_ids"]
        with torch.no_grad():
            ours = stf.float()(**video).logits
            theirs = stf(input_ids=ids, pixel_values=images["pixel_values"]).logits
        assert torch.allclose(ours, theirs, atol=1e-5)
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        as_images = {"input_ids": ids, "pixel_values": images["pixel_values"]}
        assert torch.equal(stf.generate(**video, **options), stf.generate(**as_images, **options))

    def test_a_token_of_its_own_beside_images(self, processor):
        """As in LLaVA-NeXT-Video; videos of one length come as one tensor."""
        tokenizer = build.tokenizer([*build.SPECIAL, *build.WORDS, "<video>"])
        processor = li.LlavaStfProcessor(processor.image_processor, tokenizer)
        config = build.options(video_token_index=processor.video_token_id, vision_feature_layer=[5, 3, 1])
        stf = li.LlavaStfForConditionalGeneration(li.LlavaStfConfig(**config)).eval()
        text = ["<video> and <image>", "what <video>"]
        found, inputs = process(processor, text, images=frames(1), videos=[frames(2, 1), frames(2, 3)])
        assert found == [4, 0]
        assert (inputs["input_ids"] == processor.video_token_id).sum(1).tolist() == [8, 8]
        assert inputs["pixel_values_videos"].shape == (2, 2, 3, 56, 56)
        with torch.no_grad():
            got = stf(**inputs).logits
            as_images = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.video_token_id, 4)
            pixels = processor(images=[*frames(2, 1), *frames(1), *frames(2, 3)], return_tensors="pt")["pixel_values"]
            mask = inputs["attention_mask"]
            expected = stf(input_ids=as_images, pixel_values=pixels, attention_mask=mask).logits
        assert torch.allclose(got, expected, atol=1e-5)
        for beams in (1, 2):
            assert stf.generate(**inputs, max_new_tokens=2, num_beams=beams).shape[0] == 2

    def test_expanded_prompts(self, processor):
        found, inputs = process(processor, "USER : " + "<image>" * 12 + " what", videos=[frames(3)])
        assert found == [12]
        assert inputs["pixel_values_videos"].shape == (1, 3, 3, 56, 56)

    @pytest.mark.parametrize("videos", [None, [], [[]]], ids=str)
    def test_no_videos(self, processor, videos):
        """Evaluation harnesses send an empty list beside images."""
        _, inputs = process(processor, images=build.image(), videos=videos)
        assert torch.equal(inputs["pixel_values"], process(processor, images=build.image())[1]["pixel_values"])
        assert "pixel_values_videos" not in inputs

    @pytest.mark.parametrize("videos", [torch.zeros(0, 3, 8, 8), [torch.zeros(0, 3, 8, 8).numpy()]], ids=str)
    def test_without_frames(self, processor, videos):
        with pytest.raises(ValueError, match="videos: expected at least one frame"):
            processor(videos=videos, text="<image>")

    @pytest.mark.parametrize("video", [[None], [[None]], 3, {}, b"x", [["a.png", "b.png"]], ...], ids=repr)
    def test_what_is_no_video(self, processor, video):
        with pytest.raises((ValueError, TypeError), match="videos: expected"):
            processor(videos=video, text="<image>")

    def test_frames_of_several_sizes_and_kinds(self, processor):
        three = [build.image(0), build.image(1, (30, 90)), build.image(2).convert("L")]
        found, inputs = process(processor, videos=[three])
        assert found == [12]
        expected = processor(images=three, return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values_videos"][0], expected)

    def test_a_prompt_without_one(self, processor):
        text = ["a cat", "<image> dog"]
        found, inputs = process(processor, text, videos=[[], [frames(2)]])
        assert found == [0, 8]
        assert len(inputs["pixel_values_videos"]) == 1

    def test_one_array_of_one_video_or_several_or_nested_by_prompt(self, processor):
        video = torch.randint(0, 256, (2, 3, 60, 80, 3), dtype=torch.uint8).numpy()
        assert process(processor, videos=video[0])[0] == [12]
        found, one = process(processor, "<image> and <image>", videos=video)
        _, other = process(processor, "<image> and <image>", videos=[[video[0]], [list(video[1])]])
        assert found == [24]
        assert torch.equal(one["pixel_values_videos"], other["pixel_values_videos"])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"videos": "film.mp4"}, TypeError, "videos: expected frames, got a path"),
            ({"videos": [frames(2), frames(1)] * 2}, ValueError, r"text: found 3 <image> tokens for 4 video"),
            ({"videos": [frames(2), *[frames(1)] * 2]}, ValueError, r"as many frames in each, got \[2, 1, 1\]"),
            ({"videos": frames(1), "images": frames(1)}, ValueError, "videos: expected images or videos, .* got both"),
            ({"videos": frames(2)}, ValueError, r"text: found 3 <image> tokens for 1 video\(s\); expected 1, .* or 8"),
        ],
    )
    def test_bad_videos(self, processor, options, error, message):
        with pytest.raises(error, match=message):
            processor(text="<image> <image> <image>", **options)

    def test_pixels_that_are_no_videos(self, stf):
        with pytest.raises(ValueError, match=r"pixel_values_videos: expected \[videos, .* got \[2, 3, 56, 56\]"):
            stf(input_ids=build.prompt([2])[0], pixel_values_videos=build.pixels(2))


class TestNoImages:
    """A batch without images is text; a model's input holds no pixel_values then, or none of them."""

    @pytest.mark.parametrize("images", [None, [], [[], []], [None, []], torch.empty(0, 3, 56, 56)], ids=str)
    def test_of_the_whole_batch(self, processor, images):
        found, inputs = process(processor, ["a cat", "what is"], images=images)
        assert found == [0, 0]
        assert "pixel_values" not in inputs

    def test_of_one_prompt(self, processor):
        found, inputs = process(processor, ["<image> a cat", "what is", "<image>"], images=[frames(1), None, frames(1)])
        assert found == [4, 0, 4]
        assert torch.equal(inputs["pixel_values"], processor(images=frames(1) * 2, return_tensors="pt")["pixel_values"])

    def test_in_the_model(self, stf):
        ids, mask = build.prompt([0, 0])
        expected = build.run(stf, ids, None, mask).logits
        assert torch.equal(build.run(stf, ids, build.pixels(0), mask).logits, expected)
        plain = build.generate(stf, ids, mask, None)
        assert torch.equal(build.generate(stf, ids, mask, build.pixels(0)), plain)


def test_from_the_stock_processor(processor):
    stock = LlavaProcessor(processor.image_processor, processor.tokenizer, 14, "default", num_additional_image_tokens=1)
    assert process(stock, images=build.image())[0] == [16]
    assert process(li.LlavaStfProcessor.from_llava(stock), images=build.image())[0] == [4]
    with pytest.raises(TypeError, match="processor: expected a LlavaProcessor, got NoneType"):
        li.LlavaStfProcessor.from_llava(None)
    stock.patch_size = None  # as in checkpoints of 2023
    match = r"patch_size: .* got None; set it to model\.config\.vision_config\.patch_size"
    with pytest.raises(ValueError, match=match):
        li.LlavaStfProcessor.from_llava(stock)


class TestBadInput:
    @pytest.mark.parametrize(
        ("images", "text", "found", "expected"),
        [
            (1, "<image> <image>", 2, "expected 1, one per image, or 4"),
            (2, "<image>", 1, "expected 2, one per image, or 8"),
            (1, "a cat", 0, "expected 1"),
            (0, "<image> a cat", 1, "expected 0"),
            (1, "<image>" * 16, 16, "expected 1, one per image, or 4 where they are expanded"),
        ],
    )
    def test_counts_that_do_not_match(self, processor, images, text, found, expected):
        with pytest.raises(ValueError, match=rf"text: found {found} <image> tokens for \d image\(s\); {expected}"):
            processor(images=frames(images) or None, text=text)

    def test_images_of_another_prompt(self, processor):
        """As many in all, but the second image would have gone into the second prompt."""
        with pytest.raises(ValueError, match=r"text: found 1 <image> tokens in prompt 0 for 2 image\(s\)"):
            processor(images=[frames(2), frames(1)], text=["<image>", "<image> <image>"])

    @pytest.mark.parametrize("text", [7, [3, 4], [["a"]]])
    def test_text_that_is_none(self, processor, text):
        with pytest.raises((ValueError, TypeError), match="text: expected a string or a list of strings"):
            processor(images=build.image(), text=text)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patch_size": None}, "patch_size: expected a positive int, got None"),
            ({"patch_size": 0}, "patch_size: expected a positive int, got 0"),
            ({"spatial_merge_size": 2.0}, "spatial_merge_size: expected a positive int, got 2.0"),
            ({"tokenizer": None}, "tokenizer: expected one, got None"),
            ({"image_processor": None}, "image_processor: expected one, got None"),
            (
                {"tokenizer": build.tokenizer(build.SPECIAL[:4])},
                "tokenizer: expected one token for '<image>'.*add_tokens",
            ),
        ],
    )
    def test_construction(self, processor, options, message):
        parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
        with pytest.raises(ValueError, match=message):
            li.LlavaStfProcessor(**parts | options)

    def test_neither_text_nor_images(self, processor):
        with pytest.raises(ValueError, match="images, text: expected at least one"):
            processor()
