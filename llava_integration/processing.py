"""Prompts, images and videos of every family: a placeholder becomes as many tokens as the model will put there.

LLaVA-STF: (h // p // r) * (w // p // r) for an image, 144 for 336x336 pixels, patches of p = 14 and windows of r = 2; a
video of T frames has T times as many. Tiles: what the stock processor counts for patches of p * r pixels.
"""

import inspect
import math

from transformers import BatchFeature, LlavaProcessor, ProcessorMixin
from transformers.image_utils import ImageInput, get_image_size, to_numpy_array
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.video_utils import VideoInput

from .core.config import smallest_window
from .images import pictures, said, shape_of


class CompactProcessor(ProcessorMixin):
    """In front of a stock processor, which says how many tokens an image has.

    A family with videos has a `video_token` and `replace_video_token`, and counts them for `video_sizes`.
    """

    groups_images = False  # whether an image is cut otherwise where others stand in its prompt

    @classmethod
    def from_llava(cls, processor: ProcessorMixin, *, merge_size: int | None = None):
        """The processor to go with `llava_integration.from_llava(model, merge_size=merge_size)`."""
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        if not isinstance(processor, stock) or isinstance(processor, CompactProcessor):
            raise TypeError(f"processor: expected a {stock.__name__}, got {type(processor).__name__}")
        names = inspect.signature(stock).parameters
        parts = {name: getattr(processor, name) for name in names if hasattr(processor, name)}
        patch, side, prefix = cls.grid(processor)
        r = smallest_window(side) if merge_size is None else merge_size
        if type(r) is not int or not 1 <= r <= side:
            raise ValueError(f"merge_size: expected an int from 1 to {side}, the patches of a side, got {merge_size!r}")
        return cls(**parts | cls.sizes(patch, side, r, prefix))

    @staticmethod
    def grid(processor: ProcessorMixin) -> tuple[int, int, int]:
        """Pixels of a patch's side, patches of an image's or a tile's, tokens besides them, for a stock `processor`."""
        _check_size("patch_size", patch := processor.patch_size)
        crop, size = getattr(processor.image_processor, "crop_size", None), processor.image_processor.size
        pixels = (crop and crop["height"]) or size.get("height") or size["shortest_edge"]
        return patch, pixels // patch, processor.num_additional_image_tokens

    @staticmethod
    def sizes(patch: int, side: int, r: int, prefix: int) -> dict[str, int]:
        """The arguments for windows of r x r of those patches."""
        return {"patch_size": r * patch, "num_additional_image_tokens": prefix}

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """As ProcessorMixin.__call__; -> input_ids, attention_mask [B, S], pixel_values and what belongs to them.

        `text` holds one placeholder per image and per video, or the expanded tokens of all of them. `images` may be
        nested by prompt; None and empty lists are no images. `videos`: one or a list of them, each [T, h, w, 3],
        [T, 3, h, w] or a list of T frames, prepared as images are -> pixel_values_videos [V, T, 3, h, w].

        Raises ValueError or TypeError for counts that do not match and for what is no image.
        """
        return super().__call__(images=_given(images), text=text, videos=_given(videos), **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, **kwargs):
        """Text as a list, images fetched, videos as lists of frames; errors say which argument it was."""
        samples = [] if text is None else [text] if isinstance(text, str) else text
        if not isinstance(samples, (list, tuple)) or not all(isinstance(sample, str) for sample in samples):
            raise ValueError(f"text: expected a string or a list of strings, got {text!r}")
        options = {"image_processor": self.image_processor, **kwargs}
        images = None if images is None else pictures(images, **options)
        if isinstance(images, list) and all(isinstance(own, list) for own in images):
            if len(images) == len(samples):  # nested by prompt: each has to fit its own
                for index, (own, prompt) in enumerate(zip(images, samples, strict=True)):
                    self._check_count("image", [prompt], own, f" in prompt {index}", **kwargs)
            images = (images if self.groups_images else _flat(images)) if any(images) else None
        if videos is not None:
            if not hasattr(self, "video_token"):
                raise ValueError(f"videos: expected none for {type(self).__name__}; give the frames as images")
            videos = pictures(_videos(videos), name="videos", **options)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return super().model_input_names + ["pixel_values_videos"] * hasattr(self, "video_token")

    def __getattr__(self, name: str):
        """Frames are prepared as images are: transformers' own video processors need torchvision."""
        if name == "video_processor" and hasattr(self, "video_token"):
            return self.image_processor
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _process_videos(self, videos, **kwargs):
        frames, lengths = _flat(videos), [len(video) for video in videos]
        if len(set(lengths)) != 1:
            raise ValueError(f"videos: expected as many frames in each, got {lengths}; sample them alike")
        known = self.image_processor.valid_kwargs.__annotations__
        options = {name: value for name, value in kwargs.items() if name in known} | {"return_tensors": "np"}
        if tiled := hasattr(self.image_processor, "image_grid_pinpoints"):
            # The base tile of a picture that is cut once: the whole frame, resized.
            options["image_grid_pinpoints"] = [[self.image_processor.size["height"]] * 2]
        pixels = self.image_processor(frames, **options)["pixel_values"]
        pixels = pixels[:, 0] if tiled else pixels
        processed = {"pixel_values_videos": pixels.reshape(len(videos), lengths[0], *pixels.shape[1:])}
        return processed, [self.replace_video_token(processed, index) for index in range(len(videos))]

    def validate_inputs(self, images=None, text=None, videos=None, **kwargs):
        """ValueError unless the placeholders, or the expanded tokens, are as many as the images and videos need."""
        if text is None and images is None and videos is None:
            raise ValueError("images, text: expected at least one of them, got neither")
        video_token = getattr(self, "video_token", None)
        shared = video_token == self.image_token
        if shared and images is not None and videos is not None:
            shared = f"images or videos, which share the placeholder {self.image_token}"
            raise ValueError(f"videos: expected {shared}, got both; add '<video>' to the tokenizer")
        if not shared or videos is None:
            images = images if isinstance(images, list) else [] if images is None else [images]
            self._check_count("image", text, _flat(images), **kwargs)
        if video_token and (not shared or videos is not None):
            self._check_count("video", text, videos or [], **kwargs)

    def _check_count(self, kind: str, text: list[str] | None, given: list, where: str = "", **kwargs) -> None:
        """`text` has a placeholder for each of the images or lists of frames `given`, or all their tokens."""
        token = getattr(self, f"{kind}_token")
        found = sum(sample.count(token) for sample in text or [])
        if text is None or found == len(given):
            return
        needed = sum(self._counts(kind, given, **kwargs)) if given else 0
        if found != needed:
            raise ValueError(
                f"The total number of {token} tokens in the prompts should be the same as the number of {kind}s passed."
                f" text: found {found} {token} tokens{where} for {len(given)} {kind}(s); expected {len(given)}, one "
                f"per {kind}, or {needed} where they are expanded already"
            )

    def _counts(self, kind: str, given: list, **kwargs) -> list[int]:
        if kind == "image":
            sizes = [get_image_size(to_numpy_array(image)) for image in given]
            return self._get_num_multimodal_tokens(image_sizes=sizes, **kwargs).num_image_tokens
        sizes = [(len(video), *get_image_size(to_numpy_array(video[0]))) for video in given]
        return self._get_num_multimodal_tokens(video_sizes=sizes, **kwargs).num_video_tokens

    def get_text_with_replacements(self, text, images_replacements=(), videos_replacements=(), *args, **kwargs):
        """Leave prompts alone whose tokens are expanded already."""
        left, tokens = [], (self.image_token, getattr(self, "video_token", self.image_token))
        for token, replacements in zip(tokens, (images_replacements, videos_replacements), strict=True):
            found = sum(sample.count(token) for sample in text)
            left.append([] if found != len(replacements) else list(replacements))
        return super().get_text_with_replacements(text, *left, *args, **kwargs)


class LlavaStfProcessor(CompactProcessor, LlavaProcessor):
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
        _check_size("patch_size", patch_size)
        _check_size("spatial_merge_size", spatial_merge_size)
        for name, part in (("tokenizer", tokenizer), ("image_processor", image_processor)):
            if part is None:
                raise ValueError(f"{name}: expected one, got None")
        token, known = getattr(tokenizer, "image_token", image_token), tokenizer.get_vocab()
        video_token = video_token or getattr(tokenizer, "video_token", "<video>" if "<video>" in known else token)
        for placeholder in (token, video_token):
            ids = tokenizer.encode(placeholder, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                remedy = f"tokenizer.add_tokens(AddedToken({placeholder!r}, special=True)), and as many embeddings"
                raise ValueError(f"tokenizer: expected one token for {placeholder!r}, got {ids}; add it: {remedy}")
        self.spatial_merge_size, self.video_token, self.video_token_id = spatial_merge_size, video_token, ids[0]
        options = {"patch_size": patch_size, "vision_feature_select_strategy": vision_feature_select_strategy}
        options |= {"image_token": image_token, "num_additional_image_tokens": num_additional_image_tokens}
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **options, **kwargs)

    @staticmethod
    def sizes(patch: int, side: int, r: int, prefix: int) -> dict[str, int]:
        return {"patch_size": patch, "spatial_merge_size": r}

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self._tokens(*image_inputs["pixel_values"][image_idx].shape[-2:])

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        video = video_inputs["pixel_values_videos"][video_idx]
        return self.video_token * (len(video) * self._tokens(*video[0].shape[-2:]))

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs):
        """Token counts for images [(height, width)] and videos [(frames, ...)]: resizing makes all images equal."""
        counts = MultiModalData()
        if image_sizes is not None:
            counts.num_image_tokens = [self._per_image(**kwargs)] * len(image_sizes)
            counts.num_image_patches = [1] * len(image_sizes)
        if video_sizes is not None:
            counts.num_video_tokens = [frames * self._per_image(**kwargs) for frames, *_ in video_sizes]
        return counts

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


def _check_size(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        hint = "; set it to model.config.vision_config.patch_size" if name == "patch_size" else ""
        raise ValueError(f"{name}: expected a positive int, got {value!r}{hint}")


def _flat(items: list) -> list:
    """[[a, b], [c]] or [a, b, c] -> [a, b, c]"""
    return [one for item in items for one in (item if isinstance(item, (list, tuple)) else [item])]


def _given(value):
    """`value`, or None where there is nothing in it; in a list of lists None is a prompt's empty list."""
    if not isinstance(value, (list, tuple)):
        return value
    nested = any(isinstance(item, (list, tuple)) for item in value)
    value = [[] if item is None and nested else item for item in value]
    return value if any(not isinstance(item, (list, tuple)) or item for item in value) else None


def _videos(value) -> list[list]:
    """The frames of every video in `value`, which may be nested by prompt; TypeError for what is no frame."""
    shape = shape_of(value)
    if shape and 0 in shape[:-3]:
        raise ValueError(f"videos: expected at least one frame in each, got {said(value)}")
    if len(shape) == 4:
        return [list(value)]
    if len(shape) in (2, 3):
        return [[value]]
    if not shape and not isinstance(value, (list, tuple)):
        got = "a path; read the frames first" if isinstance(value, str) else said(value)
        raise TypeError(f"videos: expected frames, got {got}")
    if not shape and value and all(len(shape_of(frame)) in (2, 3) for frame in value):
        return [list(value)]
    return [video for item in value for video in _videos(item)]
