"""Broken if this fails: prompts carry a number of image tokens that the model does not expect, or say so too late."""

import pytest
import torch
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

import llava_integration as li
from tests.llava import build


def counts(processor, inputs):
    return (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()


def test_144_tokens_for_the_paper_model():
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = li.LlavaStfProcessor(images, build.tokenizer())
    inputs = processor(images=build.image(), text="USER : <image> what is", return_tensors="pt")
    assert counts(processor, inputs) == [144]
    assert inputs["pixel_values"].shape == (1, 3, 336, 336)
    assert processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (500, 300)])["num_image_tokens"] == [144, 144]


@pytest.mark.parametrize(("merge_size", "expected"), [(1, 16), (2, 4), (3, 1), (4, 1)])
def test_window_sizes(processor, merge_size, expected):
    processor = li.LlavaStfProcessor(
        processor.image_processor, processor.tokenizer, patch_size=14, spatial_merge_size=merge_size
    )
    inputs = processor(images=build.image(), text="<image> a cat", return_tensors="pt")
    assert counts(processor, inputs) == [expected]
    assert processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])["num_image_tokens"] == [expected]


def test_siglip_images_have_no_crop():
    images = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    processor = li.LlavaStfProcessor(images, build.tokenizer(), vision_feature_select_strategy="full")
    inputs = processor(images=build.image(), text="<image>", return_tensors="pt")
    assert counts(processor, inputs) == [4]
    assert processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])["num_image_tokens"] == [4]


def test_what_it_writes_the_model_takes(stf, processor):
    texts = ["USER : <image> and <image> ASSISTANT :", "what is", "<image>"]
    inputs = processor(images=[build.image(i) for i in range(3)], text=texts, padding=True, return_tensors="pt")
    assert counts(processor, inputs) == [8, 0, 4]
    assert inputs["attention_mask"][:, 0].tolist() == [1, 0, 0], "left padding"
    assert stf.float().generate(**inputs, max_new_tokens=2).shape[0] == 3


def test_images_nested_by_prompt(processor):
    images = [[build.image(0), build.image(1)], [build.image(2)]]
    inputs = processor(images=images, text=["<image> <image>", "<image>"], padding=True, return_tensors="pt")
    assert counts(processor, inputs) == [8, 4]
    assert inputs["pixel_values"].shape[0] == 3


def test_expanded_prompts_are_left_alone(processor):
    once = processor(images=[build.image()], text="USER : <image> a cat", return_tensors="pt")
    expanded = "USER : " + "<image>" * 4 + " a cat"
    again = processor(images=[build.image()], text=expanded, return_tensors="pt")
    assert torch.equal(once["input_ids"], again["input_ids"])
    two = processor(images=[build.image()] * 2, text=["<image>" * 4] * 2, return_tensors="pt")
    assert counts(processor, two) == [4, 4]


def test_text_or_images_alone(processor):
    assert "pixel_values" not in processor(text="a cat", return_tensors="pt")
    assert "input_ids" not in processor(images=build.image(), return_tensors="pt")


class TestVideo:
    """T frames are T images' worth of tokens, in order, behind one placeholder."""

    def test_frames_behind_one_placeholder(self, processor):
        frames = [build.image(i) for i in range(5)]
        video = processor(
            videos=[frames[:3], frames[3:]], text=["<image> a cat", "dog <image>"], return_tensors="pt", padding=True
        )
        assert counts(processor, video) == [12, 8]
        images = processor(images=frames, return_tensors="pt")
        assert torch.equal(video["pixel_values"], images["pixel_values"]), "frames in order, two videos in order"

    @pytest.mark.parametrize("per_frame", [1, 4], ids=["one per frame", "expanded"])
    def test_prompts_with_more_than_one_token_a_video(self, processor, per_frame):
        frames = [build.image(i) for i in range(3)]
        text = "USER : " + "<image>" * 3 * per_frame + " what"
        inputs = processor(videos=[frames], text=text, return_tensors="pt")
        assert counts(processor, inputs) == [12]
        assert len(inputs["pixel_values"]) == 3

    def test_one_video_as_an_array(self, processor):
        frames = torch.randint(0, 256, (3, 60, 80, 3), dtype=torch.uint8)
        inputs = processor(videos=frames.numpy(), text="<image> what is", return_tensors="pt")
        assert counts(processor, inputs) == [12]
        assert inputs["pixel_values"].shape[0] == 3

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
    def test_generates(self, stf, processor, options):
        inputs = processor(
            videos=[[build.image(i) for i in range(3)], [build.image(7)]],
            text=["<image> a cat", "dog <image>"],
            return_tensors="pt",
            padding=True,
        )
        assert stf.float().generate(**inputs, max_new_tokens=2, **options).shape[0] == 2

    @pytest.mark.parametrize("videos", [[], [[]], torch.zeros(0, 3, 8, 8), [torch.zeros(0, 3, 8, 8).numpy()]], ids=str)
    def test_without_frames(self, processor, videos):
        with pytest.raises(ValueError, match="videos: expected at least one frame"):
            processor(videos=videos, text="<image>")

    @pytest.mark.parametrize("video", [[None], [[None]], 3, {}, b"x", [["a.png", "b.png"]], ...], ids=repr)
    def test_what_is_no_video(self, processor, video):
        with pytest.raises((ValueError, TypeError), match="videos: expected"):
            processor(videos=video, text="<image>")

    def test_frames_of_several_sizes_and_kinds(self, processor):
        frames = [build.image(0), build.image(1, (30, 90)), build.image(2).convert("L")]
        inputs = processor(videos=[frames, frames[:1]], text="<image> and <image>", return_tensors="pt")
        assert counts(processor, inputs) == [16]
        expected = processor(images=[*frames, frames[0]], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs["pixel_values"], expected)

    def test_nested_by_prompt_and_as_one_array(self, processor):
        video = torch.randint(0, 256, (2, 3, 60, 80, 3), dtype=torch.uint8).numpy()
        one = processor(videos=video, text="<image> and <image>", return_tensors="pt")
        other = processor(videos=[[video[0]], [list(video[1])]], text="<image> and <image>", return_tensors="pt")
        assert counts(processor, one) == [24]
        assert torch.equal(one["pixel_values"], other["pixel_values"])

    def test_bad_videos(self, processor):
        with pytest.raises(TypeError, match="videos: expected frames, got a path"):
            processor(videos="film.mp4", text="<image>")
        with pytest.raises(ValueError, match=r"videos: expected images or videos, .* got both"):
            processor(videos=[build.image()], images=[build.image()], text="<image>")
        with pytest.raises(ValueError, match=r"text: found 3 <image> tokens for 1 video\(s\) of 2 frame"):
            processor(videos=[build.image(), build.image()], text="<image> <image> <image>")


def test_saved_and_loaded_by_auto_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is li.LlavaStfProcessor
    assert (loaded.patch_size, loaded.spatial_merge_size) == (14, 2)
    inputs, again = (p(images=build.image(), text="<image> a cat", return_tensors="pt") for p in (processor, loaded))
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert torch.equal(inputs["pixel_values"], again["pixel_values"])


def test_from_the_stock_processor(processor):
    stock = LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    assert counts(stock, stock(images=build.image(), text="<image>", return_tensors="pt")) == [16]
    ours = li.LlavaStfProcessor.from_llava(stock)
    assert counts(ours, ours(images=build.image(), text="<image>", return_tensors="pt")) == [4]
    with pytest.raises(TypeError, match="processor: expected a LlavaProcessor, got NoneType"):
        li.LlavaStfProcessor.from_llava(None)
    stock.patch_size = None  # as in checkpoints of 2023
    with pytest.raises(
        ValueError, match=r"patch_size: .* got None; set it to model\.config\.vision_config\.patch_size"
    ):
        li.LlavaStfProcessor.from_llava(stock)


def test_chat_template(processor):
    content = [{"type": "image", "image": build.image()}, {"type": "text", "text": "what is"}]
    inputs = processor.apply_chat_template(
        [{"role": "USER", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert counts(processor, inputs) == [4]


class TestBadInput:
    @pytest.mark.parametrize(
        ("images", "text", "found", "expected"),
        [
            (1, "<image> <image>", 2, "expected 1, one per image, or 4"),
            (2, "<image>", 1, "expected 2, one per image, or 8"),
            (1, "a cat", 0, "expected 1"),
            (0, "<image> a cat", 1, "expected 0"),
            (1, "<image>" * 16, 16, "expected 1, one per image, or 4 where LlavaStfProcessor has expanded"),
        ],
    )
    def test_counts_that_do_not_match(self, processor, images, text, found, expected):
        images = [build.image()] * images or None
        with pytest.raises(ValueError, match=rf"text: found {found} <image> tokens for \d image\(s\); {expected}"):
            processor(images=images, text=text)

    def test_neither_text_nor_images(self, processor):
        with pytest.raises(ValueError, match="images, text: expected at least one"):
            processor()

    @pytest.mark.parametrize("text", [7, [3, 4], [["a"]]])
    def test_text_that_is_none(self, processor, text):
        with pytest.raises((ValueError, TypeError), match="text: expected a string or a list of strings"):
            processor(images=build.image(), text=text)

    @pytest.mark.parametrize("image", [3, {"a": 1}, "no-such-file.png", [None]])
    def test_an_image_that_is_none(self, processor, image):
        with pytest.raises((ValueError, TypeError), match="images: expected"):
            processor(images=image, text="<image>")

    def test_images_of_another_prompt(self, processor):
        """As many in all, but the second image would have gone into the second prompt."""
        images = [[build.image(0), build.image(1)], [build.image(2)]]
        with pytest.raises(ValueError, match=r"text: found 1 <image> tokens in prompt 0 for 2 image\(s\)"):
            processor(images=images, text=["<image>", "<image> <image>"])

    @pytest.mark.parametrize("pad", [False, True])
    def test_arrays_that_are_no_image(self, processor, pad):
        processor.image_processor = LlavaImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=pad
        )
        for shape in ((8, 8, 2), (0, 8, 3), (5,)):
            with pytest.raises(ValueError, match=r"^images: expected") as caught:
                processor(images=torch.zeros(shape, dtype=torch.uint8).numpy(), text="<image>")
            assert "\n" not in str(caught.value)

    def test_a_file_that_is_no_image_and_one_that_is_not_there(self, processor, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        for name in (str(tmp_path / "text.png"), str(tmp_path / "none.png"), "http://127.0.0.1:9/none.png"):
            with pytest.raises(ValueError, match=rf"^images: expected .* got '{name}'"):
                processor(images=name, text="<image>")

    @pytest.mark.parametrize(("name", "value"), [("patch_size", None), ("patch_size", 0), ("spatial_merge_size", 2.0)])
    def test_sizes(self, processor, name, value):
        with pytest.raises(ValueError, match=f"{name}: expected a positive int, got {value}"):
            li.LlavaStfProcessor(processor.image_processor, processor.tokenizer, **{name: value})

    def test_a_tokenizer_without_the_image_token(self, processor):
        with pytest.raises(ValueError, match=r"tokenizer: expected one token for '<image>'.*add_tokens"):
            li.LlavaStfProcessor(processor.image_processor, build.tokenizer(with_image=False))

    def test_parts_that_are_missing(self, processor):
        with pytest.raises(ValueError, match="tokenizer: expected one, got None"):
            li.LlavaStfProcessor(processor.image_processor)
        with pytest.raises(ValueError, match="image_processor: expected one, got None"):
            li.LlavaStfProcessor(tokenizer=processor.tokenizer)
