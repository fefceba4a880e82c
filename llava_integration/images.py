"""One picture, the same pixels, whatever way it comes in: a path, a file:// or http(s):// URL, base64, a PIL image, an
array or a tensor becomes an upright RGB image of 8 bits.

    rotated       turned upright by its EXIF orientation
    transparent   laid over white
    16 bit        v / 257: uint16, PIL's I;16 and I
    float         from 0 to 1, times 255; anything beyond is refused
    bool          0 and 255
    animated      refused: one frame is an image, all of them are a video

With do_rescale=False arrays and tensors are the caller's own business and pass as they are.
"""

import base64
import binascii
import io
import os
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

LARGE = 2**20  # pixels: a strip that would become so many is cut to what the crop keeps before it is resized
MARGIN = 4  # of its pixels on either side, or of the result's where those are larger: more than a filter's reach


def pictures(images: Any, *, name: str = "images", image_processor: Any = None, **options: Any) -> Any:
    """`images`, nested as it is, each as above. ValueError names every one that is broken by its index."""
    options |= options.get("images_kwargs") or {}
    wrong: list[str] = []

    def convert(value: Any, place: str) -> Any:
        if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 3:
            return [convert(item, f"{place or f' at {name}'}[{i}]") for i, item in enumerate(value)]
        try:
            if options.get("do_rescale") is False and not isinstance(value, (str, os.PathLike, Image.Image)):
                _channels_last(value, options.get("input_data_format"))
                return value
            return _without_ends(picture(value, options.get("input_data_format")), image_processor, options)
        except Exception as error:  # files, network and codecs raise what they like
            wrong.append(f"{said(value)}{place} ({type(error).__name__}: {short(error)})")

    converted = convert(images, "")
    if wrong:
        raise ValueError(f"{name}: expected PIL images, arrays, paths or lists of them, got {'; '.join(wrong)}")
    return converted


def picture(value: Any, layout: Any = None) -> Image.Image:
    """One image as above; raises what reading it raises."""
    if isinstance(value, (str, os.PathLike)):
        with _open(os.fspath(value)) as image:
            return _of_pil(image)
    return _of_pil(value) if isinstance(value, Image.Image) else _of_array(value, layout)


def _open(source: str) -> Image.Image:
    if source.startswith(("http://", "https://", "file:", "data:")):
        with urllib.request.urlopen(source, timeout=60) as answer:
            return Image.open(io.BytesIO(answer.read()))
    if len(source) < 1024 or os.path.exists(source):
        try:
            return Image.open(source)
        except FileNotFoundError:
            if len(source) < 64:  # no image is so short
                raise
    try:
        return Image.open(io.BytesIO(base64.b64decode("".join(source.split()), validate=True)))
    except binascii.Error:
        raise FileNotFoundError("there is no such file, and it is no base64") from None


def _of_pil(image: Image.Image) -> Image.Image:
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's JPEG with its preview
        raise ValueError("it is animated; give one frame, or all of them as `videos`")
    if 0 in image.size:
        raise ValueError("expected at least one pixel")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image)
        return _of_array(array if image.mode == "F" else _within(array, 65535).astype(np.uint16), None)
    if ("A" in image.mode.upper() and image.mode != "LAB") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _channels_last(value: Any, layout: Any) -> np.ndarray:
    """[h, w], [h, w, c] or [c, h, w] with one, three or four channels; where both would do, `layout` decides."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise ValueError("it requires a gradient, which no processor keeps; detach it")
        value = value.float() if value.dtype == torch.bfloat16 else value
        value = value.cpu().numpy()
    array = np.asarray(value)
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"expected [h, w], [h, w, c] or [c, h, w] of numbers, got {array.dtype} {list(array.shape)}")
    if array.ndim == 3:
        last = getattr(layout, "value", layout) == "channels_last" or array.shape[0] not in (1, 3, 4)
        array = array if last else np.moveaxis(array, 0, -1)
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"expected one, three or four channels, got {list(array.shape)}")
        array = array[..., 0] if array.shape[-1] == 1 else array
    return array


def _of_array(value: Any, layout: Any) -> Image.Image:
    array = _channels_last(value, layout)
    kind = array.dtype.kind
    if kind == "f":
        array = np.rint(_within(array, 1, "; scale to 0..1, or give uint8 for 0..255") * 255.0)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257)
    elif kind != "b":
        array = _within(array, 255)
    pixels = array.astype(np.uint8) * (255 if kind == "b" else 1)
    return _of_pil(Image.fromarray(np.ascontiguousarray(pixels)))


def _within(array: np.ndarray, most: int, remedy: str = "") -> np.ndarray:
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= most):  # NaN is neither
        raise ValueError(f"expected {array.dtype} from 0 to {most}, got {low:.4g} to {high:.4g}{remedy}")
    return array


def _without_ends(image: Image.Image, processor: Any, options: dict[str, Any]) -> Image.Image:
    """A strip as far as the centre crop will keep it: 1 x 1000 pixels would become 336 x 336,000 first.

    As much goes at either end, in whole multiples of the shorter edge: what stays is resized and cropped as before.
    """

    def option(name: str) -> Any:
        return options[name] if options.get(name) is not None else getattr(processor, name, None)

    size, crop = option("size"), option("crop_size")
    edge = size if isinstance(size, int) else dict(size or {}).get("shortest_edge")
    cropped = option("do_resize") and option("do_center_crop") and not hasattr(processor, "image_grid_pinpoints")
    short, long = sorted(image.size)
    if not (cropped and edge and crop) or edge * edge * long / short <= LARGE:
        return image
    kept = crop if isinstance(crop, int) else max(dict(crop).values())
    needed = max(short, LARGE * short / edge**2, kept * short / edge + 2 * MARGIN * max(1, short / edge))
    cut = int(max(0, long - needed) // (2 * short)) * short
    upright = image.size[0] == short
    return image.crop((0, cut, short, long - cut) if upright else (cut, 0, long - cut, short))


def shape_of(value: Any) -> tuple[int, ...]:
    """Of an array or a PIL image; () for anything else."""
    return value.size if isinstance(value, Image.Image) else tuple(getattr(value, "shape", ()))


def said(value: Any) -> str:
    """What a message calls `value`."""
    shape = shape_of(value)
    return f"{type(value).__name__} of shape {list(shape)}" if shape else short(repr(value))


def short(value: Any) -> str:
    """In one line, and not all of a long one."""
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:120] + "..."
