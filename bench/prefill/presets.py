"""The sizes that are measured, and the memory they need, as plain numbers (no torch: read before it is imported).

cpu   the real vision tower and projector, and two layers of a language model of 7B width: every ratio is a real one
7b    LLaVA-1.5-7B          13b   LLaVA-1.5-13B          tiny   a toy for tests; its times mean nothing
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass
from typing import NamedTuple

BLOCKS = (23, 21, 18, 15, 12, 9, 6, 3)  # LLaVA-STF's, of a tower of 24 layers, deepest first
SWEEP = {"batch": (1, 2, 4, 8, 16, 32), "text": (64, 256, 1024), "images": (1, 4, 16)}


@dataclass(frozen=True)
class Preset:
    """Sizes of a LLaVA-1.5: the language model's, then the tower's."""

    name: str
    dim: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32064
    vision_dim: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    batches: tuple[int, ...] = (1,)
    text_tokens: int = 64
    image_token: int | None = None  # of a checkpoint; a random model takes one of the last ids
    kv_heads: int | None = None  # fewer than heads: grouped queries
    head_dim: int | None = None  # where it is not dim / heads

    @property
    def image_token_id(self) -> int:
        return self.vocabulary - 8 if self.image_token is None else self.image_token

    @property
    def query_dim(self) -> int:
        """Width of all queries of a token, and of what attention returns."""
        return self.heads * self.head_dim if self.head_dim else self.dim

    @property
    def kv_dim(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.query_dim * (self.kv_heads or self.heads) // self.heads

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def image_tokens(self, merge_size: int) -> int:
        return (self.grid // merge_size) ** 2

    @property
    def vision_parameters(self) -> int:
        layer = 4 * self.vision_dim**2 + 2 * self.vision_dim * self.vision_intermediate
        return self.vision_layers * layer + (self.grid**2 + 1 + 3 * self.patch_size**2) * self.vision_dim

    @property
    def language_parameters(self) -> int:
        layer = 2 * self.dim * (self.query_dim + self.kv_dim) + 3 * self.dim * self.intermediate
        return self.layers * layer + 2 * self.vocabulary * self.dim

    @property
    def projector_parameters(self) -> dict[str, int]:
        """mlp2x: the stock projector. stf: with the hidden width that the exact warm start needs."""
        c, d = self.vision_dim, self.dim
        return {"mlp2x": c * d + d * d, "stf": 4 * len(BLOCKS) * c * c + 4 * c * c + 16 * c * d + 4 * d * d}

    def kv_bytes(self, tokens: int, batch: int, item: int) -> int:
        return 2 * self.layers * tokens * self.kv_dim * batch * item

    def activation_bytes(self, point: Point, item: int) -> int:
        """What a prompt adds to the weights: its cache, and a few buffers as wide as the widest that live at once."""
        tokens = point.images * self.image_tokens(1) + point.text_tokens
        # The stock model keeps every hidden state of its tower.
        widest = max(3 * self.intermediate, 16 * self.vision_dim, self.vision_layers * self.vision_dim)
        return self.kv_bytes(tokens, point.batch, item) + 2 * item * point.batch * tokens * widest

    def memory_bytes(self, point: Point, item: int) -> int:
        """What a run of all rows holds at its peak; they share their weights."""
        weights = self.vision_parameters + self.language_parameters + sum(self.projector_parameters.values())
        return item * weights + self.activation_bytes(point, item)


TINY = {"vocabulary": 512, "vision_dim": 32, "vision_intermediate": 64, "vision_heads": 4, "image_size": 56}
PRESETS = {
    "cpu": Preset("cpu", dim=4096, intermediate=11008, layers=2, heads=32, text_tokens=40),
    "7b": Preset("7b", dim=4096, intermediate=11008, layers=32, heads=32, batches=(1, 8)),
    "13b": Preset("13b", dim=5120, intermediate=13824, layers=40, heads=40, batches=(1, 8)),
    "tiny": Preset("tiny", dim=64, intermediate=96, layers=2, heads=4, text_tokens=8, **TINY),
}


class Point(NamedTuple):
    """One size that every row is measured at; `images` are those of one sequence."""

    batch: int
    text_tokens: int
    images: int = 1

    def __str__(self) -> str:
        return f"batch {self.batch}, text {self.text_tokens}" + f", {self.images} images" * (self.images > 1)


def points(args: argparse.Namespace) -> list[Point]:
    """In the order they are measured: of a sweep, the first point is part of each line."""
    batches, texts = args.batch or list(args.preset.batches), args.text or [args.preset.text_tokens]
    images = args.images or [1]
    if not args.sweep:
        return list(itertools.starmap(Point, itertools.product(batches, texts, images)))
    lines = [Point(b, texts[0], images[0]) for b in args.batch or SWEEP["batch"]]
    lines += [Point(batches[0], t, images[0]) for t in args.text or SWEEP["text"]]
    lines += [Point(batches[0], texts[0], i) for i in args.images or SWEEP["images"]]
    return list(dict.fromkeys(lines))


def memory_problem(preset: Preset, wanted: list[Point], device: str, option: str) -> str | None:
    """Why not even the smallest point fits, from the sizes alone; None when it does."""
    from ..meters import available_bytes

    item = 2 if device == "cuda" else 4
    need, smallest = min((preset.memory_bytes(point, item), point) for point in wanted)
    available = available_bytes(device)
    if available is None or need <= available:
        return None
    return (
        f"{option}: {preset.name!r} at batch {smallest.batch} needs about {need / 2**30:.1f} GiB on "
        f"{device} and {available / 2**30:.1f} GiB are free; use a smaller preset or a larger device"
    )


def point_problem(preset: Preset, point: Point, device: str) -> str | None:
    """Why a point is not tried beside the loaded weights. Only on a CPU: there running out ends the process."""
    from ..meters import available_bytes

    available, need = available_bytes(device), preset.activation_bytes(point, 4)
    if device == "cuda" or available is None or need <= available:
        return None
    return f"does not fit into memory (about {need / 2**30:.1f} GiB needed, {available / 2**30:.1f} GiB free)"
