"""Broken if this fails: a picture gives other pixels when it comes in another way, a broken one is not named by its
place, or a strip of a few pixels takes gigabytes."""

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

import llava_integration as li
from llava_integration import chat
from llava_integration import images as module
from llava_integration.images import pictures
from tests.llava import build, tiled

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def file_of(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def rotated():
    """A JPEG that a viewer turns by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(PIXELS), "JPEG", exif=exif, quality=100, subsampling=0)
    upright = np.rot90(np.asarray(opened(data)), -1)
    return data, upright


def transparent():
    alpha = np.full((12, 20, 1), 255, np.uint8)
    alpha[:6] = 0
    white = PIXELS.copy()
    white[:6] = 255
    return file_of(Image.fromarray(np.concatenate([PIXELS, alpha], -1))), white


def palette():
    """Its first colour is transparent."""
    image = Image.fromarray((np.arange(240) % 2).astype(np.uint8).reshape(12, 20), "P")
    image.putpalette([9, 9, 9, 200, 100, 50])
    expected = np.where((np.arange(240) % 2).reshape(12, 20, 1) == 0, 255, np.array([200, 100, 50])).astype(np.uint8)
    return file_of(image, transparency=0), expected


def grey_16():
    values = np.arange(240, dtype=np.uint16).reshape(12, 20) * 257
    return file_of(Image.fromarray(values)), np.repeat((values // 257)[..., None], 3, -1).astype(np.uint8)


FILES = {"rotated": rotated, "transparent": transparent, "palette": palette, "16 bit": grey_16}
WAYS = {
    "path": lambda data, path: str(path),
    "PathLike": lambda data, path: path,
    "URL of a file": lambda data, path: path.as_uri(),
    "base64": lambda data, path: base64.encodebytes(data).decode(),
    "data URL": lambda data, path: "data:image/png;base64," + base64.b64encode(data).decode(),
    "PIL": lambda data, path: opened(data),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", FILES)
def test_a_file_is_the_same_picture_whatever_way_it_comes(what, way, tmp_path):
    data, expected = FILES[what]()
    path = tmp_path / "ä picture 1.png"
    path.write_bytes(data)
    found = pictures([[WAYS[way](data, path)]])[0][0]
    assert (found.mode, np.array_equal(np.asarray(found), expected)) == ("RGB", True)


@pytest.mark.parametrize("what", FILES)
def test_training_and_chat_see_what_the_processor_sees(what, tmp_path):
    train_cache = pytest.importorskip("llava_integration.train_cache")  # needs accelerate
    data, expected = FILES[what]()
    (path := tmp_path / "a.png").write_bytes(data)
    for read in (train_cache.open_image, chat.show):
        assert np.array_equal(np.asarray(read(path)), expected)


def test_an_http_url(monkeypatch):
    data, expected = transparent()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(data))
    assert np.array_equal(np.asarray(pictures("https://host/a.png")), expected)


GREY = PIXELS[..., 0]
ALPHA = np.concatenate([PIXELS, np.zeros((12, 20, 1), np.uint8)], -1)
ARRAYS = {
    "uint8": (PIXELS, PIXELS),
    "channels first": (PIXELS.transpose(2, 0, 1), PIXELS),
    "tensor": (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
    "0..1": (PIXELS.astype(np.float64) / 255, PIXELS),
    "0..1 in fp16": (torch.from_numpy(PIXELS).half() / 255, PIXELS),
    "0..1 in bf16": (torch.full((3, 4, 4), 0.5).bfloat16(), np.full((4, 4, 3), 128, np.uint8)),
    "bool": (GREY > 99, np.repeat(((GREY > 99) * 255)[..., None], 3, -1)),
    "uint16": (PIXELS.astype(np.uint16) * 257, PIXELS),
    "int64": (PIXELS.astype(np.int64), PIXELS),
    "grey": (GREY[..., None], np.repeat(GREY[..., None], 3, -1)),
    "alpha": (ALPHA, np.full_like(PIXELS, 255)),
    "alpha, first": (ALPHA.transpose(2, 0, 1).copy(), np.full_like(PIXELS, 255)),
    "strided": (PIXELS[::2, ::-1], PIXELS[::2, ::-1]),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays(what):
    given, expected = ARRAYS[what]
    assert np.array_equal(np.asarray(pictures(given)), expected)


@pytest.mark.parametrize("family", tiled.ALL)
def test_through_the_processor(family, tmp_path):
    """Image, batch and frames of a video."""
    processor, (data, upright) = tiled.stf_processor(tiled.ALL[family]()), rotated()
    (path := tmp_path / "a.jpg").write_bytes(data)

    def pixels(images, **options):
        text = "<image>" * (len(images) if isinstance(images, list) else 1)
        return processor(images=images, text=text, return_tensors="pt", **options)["pixel_values"]

    expected = pixels(Image.fromarray(upright))
    ways = [path, opened(data), upright, torch.from_numpy(upright.copy()).permute(2, 0, 1), upright / 255.0]
    assert all(torch.equal(pixels(given), expected) for given in ways)
    batch = pixels(ways)
    assert torch.equal(batch, expected.expand_as(batch))
    if hasattr(processor, "video_token"):
        frames = processor(videos=[opened(data), upright], text=processor.video_token, return_tensors="pt")
        base = expected if family == "llava" else expected[:, 0]
        assert torch.equal(frames["pixel_values_videos"][0], base.expand(2, -1, -1, -1))
    if family == "llava":
        floats = torch.rand(1, 3, 56, 56)
        own = pixels(floats, do_rescale=False, do_normalize=False)
        torch.testing.assert_close(own, floats, rtol=0, atol=1 / 255)  # PIL resizes in 8 bit


def broken_png():
    """Its checksum is wrong."""
    data = bytearray(file_of(Image.fromarray(PIXELS)))
    data[data.index(b"IDAT") + 8] ^= 255
    return bytes(data)


def bomb():
    """Sixty thousand pixels square, in a few bytes."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def closed():
    data = file_of(Image.fromarray(PIXELS), "JPEG")
    with io.BytesIO(data) as stream:
        return Image.open(stream)


DARK = Image.new("L", (4, 4))
BROKEN = {
    "truncated": lambda: opened(file_of(Image.fromarray(PIXELS), "JPEG")[:-200]),
    "checksum": lambda: opened(broken_png()),
    "bomb": lambda: base64.b64encode(bomb()).decode(),
    "animated": lambda: opened(file_of(DARK, "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 9)])),
    "file closed": closed,
    "gradient": lambda: torch.rand(3, 4, 4, requires_grad=True),
    "0..255 in floats": lambda: PIXELS.astype(np.float32),
    "NaN": lambda: np.full((4, 4, 3), np.nan),
    "negative": lambda: PIXELS.astype(np.int64) - 1,
    "complex": lambda: PIXELS.astype(np.complex64),
    "five channels": lambda: np.zeros((5, 9, 9), np.uint8),
    "nothing": lambda: None,
    "no width": lambda: Image.new("RGB", (0, 5)),
    "no pixels": lambda: np.zeros((0, 4, 3), np.uint8),
    "two channels": lambda: np.zeros((8, 8, 2), np.uint8),
    "one row": lambda: np.zeros(9),
    "no file": lambda: "nowhere.png",
    "a file of text": lambda: __file__,
    "a server that is not there": lambda: "http://127.0.0.1:9/none.png",
    "no object of ours": lambda: object(),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_named_by_its_place(what, processor):
    with pytest.raises(ValueError, match=r"^images: expected .* at images\[1\] \(\w+: ") as caught:
        processor(images=[PIXELS, BROKEN[what]()], text="<image> <image>", return_tensors="pt")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("what", ["gradient", "complex", "five channels", "no pixels", "one row", "no object of ours"])
def test_what_is_not_rescaled_has_to_be_an_image_all_the_same(what, processor):
    with pytest.raises(ValueError, match=r"^images: expected .* at images\[1\] \(ValueError: "):
        processor(images=[PIXELS / 255, BROKEN[what]()], text="<image> <image>", do_rescale=False)


def test_all_that_are_broken_are_named():
    with pytest.raises(ValueError, match=r"at images\[0\]\[1\] .*at images\[2\]\[0\] "):
        pictures([[PIXELS, "nowhere.png"], [PIXELS], [torch.rand(3, 4, 4, requires_grad=True)]])


@pytest.mark.parametrize("edge", [56, 64])
@pytest.mark.parametrize("size", [(1, 1000), (5000, 2), (3, 1500), (20000, 40)], ids=str)
def test_a_strip_costs_what_its_result_needs(size, edge, monkeypatch):
    """And has the pixels that it has when it is resized whole. Not too much contrast: PIL cuts off what overshoots
    between its two passes, whose order depends on the size."""
    clip = CLIPImageProcessorPil(**build.square(56) | {"size": {"shortest_edge": edge}})
    strip = Image.fromarray(np.random.default_rng(1).integers(90, 170, (*size[::-1], 3), dtype=np.uint8))
    processor = li.LlavaStfProcessor(clip, build.tokenizer())

    def run():
        return processor(images=strip, text="<image>", return_tensors="pt")["pixel_values"]

    cut = pictures(strip, image_processor=clip).size
    assert edge**2 * max(cut) / min(cut) <= 1.02 * module.LARGE
    tracemalloc.start()
    found = run()
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    monkeypatch.setattr(module, "LARGE", 10**12)
    assert (found - run()).abs().max() < 0.04  # a level of 8 bit is 0.015
