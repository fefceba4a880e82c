"""Prompts and images for LLaVA-STF: every image placeholder becomes (h // p // r) * (w // p // r) image tokens.

144 for 336x336 pixels, patches of p = 14 and windows of r = 2. A video is its frames in order, behind one placeholder.
"""

import contextlib
import math
import re
from collections.abc import Iterator

from PIL import Image
from transformers import LlavaProcessor, PreTrainedConfig
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

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
        spatial_merge_size (`int`, defaults to 2): side of the window that becomes one token.

    Raises ValueError for sizes that are not positive ints and a tokenizer without a single token for `image_token`.
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
        **kwargs,
    ):
        for name, value in (("patch_size", patch_size), ("spatial_merge_size", spatial_merge_size)):
            if type(value) is not int or value < 1:
                hint = "; set it to model.config.vision_config.patch_size" if name == "patch_size" else ""
                raise ValueError(f"{name}: expected a positive int, got {value!r}{hint}")
        for name, part in (("tokenizer", tokenizer), ("image_processor", image_processor)):
            if part is None:
                raise ValueError(f"{name}: expected one, got None")
        token = getattr(tokenizer, "image_token", image_token)
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"tokenizer: expected one token for {token!r}, got {ids}; add it with "
                f"tokenizer.add_tokens(AddedToken({token!r}, special=True)) and give the model as many embeddings"
            )
        self.spatial_merge_size = spatial_merge_size
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

    def __call__(self, images=None, text=None, videos=None, **kwargs):
        """As ProcessorMixin.__call__; -> input_ids, attention_mask [B, S], pixel_values [N, 3, h, w].

        `text` holds one placeholder per image, or the expanded tokens of all of them. `videos`: instead of images, one
        video or a list of them, each [T, h, w, 3], [T, 3, h, w] or a list of T frames; one placeholder a video, T
        images in pixel_values.

        Raises ValueError or TypeError for counts that do not match, both kinds at once, or what is no image.
        """
        if videos is not None:
            if images is not None:
                raise ValueError("videos: expected images or videos, which share a placeholder, got both")
            images, text = self._frames(videos, text, **kwargs)
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Text as a list, images fetched; errors that say which argument it was."""
        samples = [] if text is None else [text] if isinstance(text, str) else text
        if not isinstance(samples, (list, tuple)) or not all(isinstance(sample, str) for sample in samples):
            raise ValueError(f"text: expected a string or a list of strings, got {text!r}")
        images = None if images is None else pictures(images, image_processor=self.image_processor, **kwargs)
        with _refusing(images):
            return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _process_images(self, images, **kwargs):
        with _refusing(images):
            return super()._process_images(images, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        """ValueError unless the placeholders, or the expanded image tokens, are as many as the images need."""
        if text is None:
            if images is None:
                raise ValueError("images, text: expected at least one of them, got neither")
            return
        per_image = self._per_image(**kwargs)
        count = 0 if images is None else len(self._flat(images))
        self._check_count(self._count(text), count, per_image)
        if isinstance(images, (list, tuple)) and len(images) == len(text):
            for index, (own, prompt) in enumerate(zip(images, text, strict=True)):
                if isinstance(own, (list, tuple)):  # nested by prompt: each has to fit its own
                    self._check_count(self._count([prompt]), len(own), per_image, f" in prompt {index}")

    def _check_count(self, found: int, images: int, per_image: int, where: str = "") -> None:
        if found not in (images, images * per_image):
            raise ValueError(
                f"text: found {found} {self.image_token} tokens{where} for {images} image(s); expected {images}, one "
                f"per image, or {images * per_image} where LlavaStfProcessor has expanded them already "
                f"({per_image} an image)"
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self._tokens(height, width)

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """Leave prompts alone whose image tokens are expanded already."""
        expanded = sum(self._count([replacement]) for replacement in images_replacements)
        if images_replacements and self._count(text) == expanded != len(images_replacements):
            return text, [[] for _ in text]
        return super().get_text_with_replacements(text, list(images_replacements), *args, **kwargs)

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

    def _count(self, text: list[str]) -> int:
        return sum(sample.count(self.image_token) for sample in text)

    @staticmethod
    def _flat(images) -> list:
        with _refusing(images):
            flat = make_flat_list_of_images(images)
        if empty := [image for image in flat if 0 in _shape(image)]:
            raise ValueError(f"images: expected at least one pixel in each, got {_describe(empty[0])}")
        return flat

    def _frames(self, videos, text, **kwargs):
        """videos -> all frames as one list of images, and text with one placeholder per frame."""
        batched = _videos(videos)
        if not batched or not all(batched):
            raise ValueError(f"videos: expected at least one frame in each, got {_describe(videos)}")
        frames = [frame for video in batched for frame in video]
        if text is None:
            return frames, None
        text = [text] if isinstance(text, str) else list(text)
        found, expanded = self._count(text), len(frames) * self._per_image(**kwargs)
        if found not in (len(batched), len(frames), expanded):
            raise ValueError(
                f"text: found {found} {self.image_token} tokens for {len(batched)} video(s) of {len(frames)} frame(s); "
                f"expected {len(batched)}, one per video, or {expanded} where LlavaStfProcessor has expanded them"
            )
        if found != len(batched):
            return frames, text
        lengths = iter(len(video) for video in batched)
        placeholder = re.compile(re.escape(self.image_token))
        return frames, [placeholder.sub(lambda match: match.group() * next(lengths), sample) for sample in text]


def _videos(value) -> list[list]:
    """The frames of every video in `value`, which may be nested by prompt; TypeError for what is no frame."""
    shape = _shape(value)
    if len(shape) == 5:
        return [list(video) for video in value]
    if len(shape) == 4:
        return [list(value)]
    if len(shape) in (2, 3):
        return [[value]]
    if not isinstance(value, (list, tuple)):
        got = "a path; read the frames first" if isinstance(value, str) else _describe(value)
        raise TypeError(f"videos: expected frames, got {got}")
    if all(len(_shape(frame)) in (2, 3) for frame in value):
        return [list(value)]
    return [video for item in value for video in _videos(item)]


def _shape(value) -> tuple[int, ...]:
    """Of an array or a PIL image; () for anything else."""
    return value.size if isinstance(value, Image.Image) else tuple(getattr(value, "shape", ()))


@contextlib.contextmanager
def _refusing(images) -> Iterator[None]:
    """Whatever is raised inside, be it by a file that is missing or is no image, or by a URL's client."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"images: expected PIL images, arrays, paths or lists of them, got {_describe(images)}"
            f" ({type(error).__name__}: {_one_line(error)})"
        ) from error


def _describe(value) -> str:
    shape = _shape(value)
    return f"{type(value).__name__} of shape {list(shape)}" if shape else _one_line(repr(value))


def _one_line(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:200] + "..."
