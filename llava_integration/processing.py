"""Prompts and images for LLaVA-STF: every image placeholder becomes (h // p // r) * (w // p // r) image tokens.

144 for 336x336 pixels, patches of p = 14 and windows of r = 2. A video of T frames becomes T times as many, behind one
placeholder: "<video>" where the tokenizer has that token, else that of an image.
"""

import contextlib
import math
from collections.abc import Iterator

from PIL import Image
from transformers import BatchFeature, LlavaProcessor, PreTrainedConfig
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.video_utils import VideoInput

from .core.config import smallest_window
from .images import pictures


class LlavaStfProcessor(LlavaProcessor):
    r"""Image processor and tokenizer of LLaVA-STF in one.

    Args:
        image_processor: any that gives pixel values of the tower's size, without torchvision the *Pil classes.
        tokenizer: must hold `image_token` as one token.
        patch_size (`int`, defaults to 14): patch size of the vision tower.
        vision_feature_select_strategy, num_additional_image_tokens: kept for LlavaProcessor's callers; the window
            covers patches only, so neither changes a count.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
        image_token (`str`, defaults to `"<image>"`): placeholder of one image in a prompt.
        video_token (`str`, *optional*): placeholder of one video; default: "<video>" or, without it, `image_token`.
        spatial_merge_size (`int`, defaults to 2): side of the window that becomes one token.

    Raises ValueError for sizes that are not positive ints and a tokenizer without a single token for a placeholder.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=1,
        spatial_merge_size=2,
        video_token=None,
        **kwargs,
    ):
        for name, value in (("patch_size", patch_size), ("spatial_merge_size", spatial_merge_size)):
            if type(value) is not int or value < 1:
                hint = "; set it to model.config.vision_config.patch_size" if name == "patch_size" else ""
                raise ValueError(f"{name}: expected a positive int, got {value!r}{hint}")
        for name, part in (("tokenizer", tokenizer), ("image_processor", image_processor)):
            if part is None:
                raise ValueError(f"{name}: expected one, got None")
        token, known = getattr(tokenizer, "image_token", image_token), tokenizer.get_vocab()
        video_token = video_token or getattr(tokenizer, "video_token", "<video>" if "<video>" in known else token)
        for placeholder in (token, video_token):
            ids = tokenizer.encode(placeholder, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"tokenizer: expected one token for {placeholder!r}, got {ids}; add it with tokenizer.add_tokens"
                    f"(AddedToken({placeholder!r}, special=True)) and give the model as many embeddings"
                )
        self.spatial_merge_size, self.video_token, self.video_token_id = spatial_merge_size, video_token, ids[0]
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @classmethod
    def from_llava(cls, processor: LlavaProcessor, *, merge_size: int | None = None) -> "LlavaStfProcessor":
        """The processor to go with `llava_integration.from_llava(model, merge_size=merge_size)`."""
        if not isinstance(processor, LlavaProcessor):
            raise TypeError(f"processor: expected a LlavaProcessor, got {type(processor).__name__}")
        made = cls(
            processor.image_processor,
            processor.tokenizer,
            patch_size=processor.patch_size,
            chat_template=processor.chat_template,
            image_token=processor.image_token,
            spatial_merge_size=1 if merge_size is None else merge_size,
        )
        if merge_size is None:
            made.spatial_merge_size = smallest_window(math.isqrt(made._per_image()))
        return made

    @staticmethod
    def sizes(config: PreTrainedConfig) -> dict[str, int]:
        """The arguments that a model's configuration decides."""
        return {"patch_size": config.vision_config.patch_size, "spatial_merge_size": config.spatial_merge_size}

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """As ProcessorMixin.__call__; -> input_ids, attention_mask [B, S], pixel_values [N, 3, h, w].

        `text` holds one placeholder per image and per video, or the expanded tokens of all of them. `images` may be
        nested by prompt; None and empty lists are no images. `videos`: one or a list of them, each [T, h, w, 3],
        [T, 3, h, w] or a list of T frames, prepared as images are -> pixel_values_videos [V, T, 3, h, w].

        Raises ValueError or TypeError for counts that do not match and for what is no image.
        """
        return super().__call__(images=_given(images), text=text, videos=_given(videos), **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, **kwargs):
        """Text as a list, images fetched and flat, videos as lists of frames; errors say which argument it was."""
        samples = [] if text is None else [text] if isinstance(text, str) else text
        if not isinstance(samples, (list, tuple)) or not all(isinstance(sample, str) for sample in samples):
            raise ValueError(f"text: expected a string or a list of strings, got {text!r}")
        images = None if images is None else pictures(images, image_processor=self.image_processor, **kwargs)
        if isinstance(images, list) and all(isinstance(own, list) for own in images):
            if len(images) == len(samples):  # nested by prompt: each has to fit its own
                for index, (own, prompt) in enumerate(zip(images, samples, strict=True)):
                    count = len(self._flat(own)) if own else 0
                    self._check_count("image", [prompt], [1] * count, f" in prompt {index}", **kwargs)
            images = [image for own in images for image in own]
        if videos is not None:
            videos = _videos(videos)
            with _refusing(videos, "videos"):
                videos = pictures(videos, image_processor=self.image_processor, **kwargs)
        with _refusing(images):
            return super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)

    def _process_images(self, images, **kwargs):
        with _refusing(images):
            return super()._process_images(images, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "pixel_values_videos"]

    @property
    def video_processor(self):
        """Frames are prepared as images are; transformers' own video processors need torchvision."""
        return self.image_processor

    def _process_videos(self, videos, **kwargs):
        frames, lengths = [frame for video in videos for frame in video], [len(video) for video in videos]
        if len(set(lengths)) != 1:
            raise ValueError(f"videos: expected as many frames in each, got {lengths}; sample them alike")
        known = self.image_processor.valid_kwargs.__annotations__
        with _refusing(frames, "videos"):
            options = {name: value for name, value in kwargs.items() if name in known} | {"return_tensors": "np"}
            pixels = self.image_processor(frames, **options)["pixel_values"]
        processed = {"pixel_values_videos": pixels.reshape(len(videos), lengths[0], *pixels.shape[1:])}
        return processed, [self.replace_video_token(processed, index) for index in range(len(videos))]

    def validate_inputs(self, images=None, text=None, videos=None, **kwargs):
        """ValueError unless the placeholders, or the expanded tokens, are as many as the images and videos need."""
        if text is None and images is None and videos is None:
            raise ValueError("images, text: expected at least one of them, got neither")
        shared = self.video_token == self.image_token
        if shared and images is not None and videos is not None:
            raise ValueError(
                f"videos: expected images or videos, which share the placeholder {self.image_token}, got both; add "
                "'<video>' to the tokenizer"
            )
        if not shared or videos is None:
            self._check_count("image", text, [] if images is None else [1] * len(self._flat(images)), **kwargs)
        if not shared or videos is not None:
            self._check_count("video", text, [len(video) for video in videos or []], **kwargs)

    def _check_count(self, kind: str, text: list[str] | None, frames: list[int], where: str = "", **kwargs) -> None:
        """`frames` of every image or video; `text` has a placeholder for each, or all their tokens."""
        if text is None:
            return
        token = getattr(self, f"{kind}_token")
        found = sum(sample.count(token) for sample in text)
        needed = sum(frames) * self._per_image(**kwargs) if frames else 0
        if found not in (len(frames), needed):
            raise ValueError(
                f"The total number of {token} tokens in the prompts should be the same as the number of {kind}s "
                f"passed. text: found {found} {token} tokens{where} for {len(frames)} {kind}(s); expected "
                f"{len(frames)}, one per {kind}, or {needed} where this processor has expanded them already"
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self._tokens(height, width)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        video = video_inputs["pixel_values_videos"][video_idx]
        return self.video_token * (len(video) * self._tokens(*video[0].shape[-2:]))

    def get_text_with_replacements(self, text, images_replacements=(), videos_replacements=(), *args, **kwargs):
        """Leave prompts alone whose tokens are expanded already."""
        left = []
        for token, replacements in ((self.image_token, images_replacements), (self.video_token, videos_replacements)):
            found = sum(sample.count(token) for sample in text)
            left.append([] if found != len(replacements) else list(replacements))
        return super().get_text_with_replacements(text, *left, *args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Token counts for images of `image_sizes` [(height, width)]: resizing makes them all equal."""
        if image_sizes is None:
            return MultiModalData()
        tokens = [self._per_image(**kwargs)] * len(image_sizes)
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(image_sizes))

    def _tokens(self, height: int, width: int) -> int:
        return math.prod(side // self.patch_size // self.spatial_merge_size for side in (height, width))

    def _per_image(self, **kwargs) -> int:
        """Tokens of an image of the size that the image processor gives every one."""
        options = {**kwargs, **kwargs.get("images_kwargs", {})}
        for name in ("crop_size", "size"):
            size = options.get(name) or getattr(self.image_processor, name, None)
            if isinstance(size, int):
                return self._tokens(size, size)
            if size and "height" in dict(size):
                return self._tokens(dict(size)["height"], dict(size)["width"])
        raise ValueError("image_processor: expected a crop_size or size with height and width, got neither")

    @staticmethod
    def _flat(images) -> list:
        with _refusing(images):
            flat = make_flat_list_of_images(images)
        if empty := [image for image in flat if 0 in _shape(image)]:
            raise ValueError(f"images: expected at least one pixel in each, got {_describe(empty[0])}")
        return flat


def _given(value):
    """`value`, or None where there is nothing in it; in a list of lists None is a prompt's empty list."""
    if not isinstance(value, (list, tuple)):
        return value
    nested = any(isinstance(item, (list, tuple)) for item in value)
    value = [[] if item is None and nested else item for item in value]
    return value if any(not isinstance(item, (list, tuple)) or item for item in value) else None


def _videos(value) -> list[list]:
    """The frames of every video in `value`, which may be nested by prompt; TypeError for what is no frame."""
    shape = _shape(value)
    if shape and 0 in shape[:-3]:
        raise ValueError(f"videos: expected at least one frame in each, got {_describe(value)}")
    if len(shape) == 5:
        return [list(video) for video in value]
    if len(shape) == 4:
        return [list(value)]
    if len(shape) in (2, 3):
        return [[value]]
    if not isinstance(value, (list, tuple)):
        got = "a path; read the frames first" if isinstance(value, str) else _describe(value)
        raise TypeError(f"videos: expected frames, got {got}")
    if value and all(len(_shape(frame)) in (2, 3) for frame in value):
        return [list(value)]
    return [video for item in value for video in _videos(item)]


def _shape(value) -> tuple[int, ...]:
    """Of an array or a PIL image; () for anything else."""
    return value.size if isinstance(value, Image.Image) else tuple(getattr(value, "shape", ()))


@contextlib.contextmanager
def _refusing(images, name: str = "images") -> Iterator[None]:
    """Whatever is raised inside, be it by a file that is missing or is no image, or by a URL's client."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name}: expected PIL images, arrays, paths or lists of them, got {_describe(images)}"
            f" ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _describe(value) -> str:
    shape = _shape(value)
    return f"{type(value).__name__} of shape {list(shape)}" if shape else _one_line(repr(value))


def _one_line(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:200] + "..."
