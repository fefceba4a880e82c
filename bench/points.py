"""What a prefill run measures, (batch, text tokens, images of a sequence), and whether it fits into memory."""

from __future__ import annotations

import argparse
import itertools

from .presets import Preset

SWEEP = {"batch": (1, 2, 4, 8, 16, 32), "text": (64, 256, 1024), "images": (1, 4, 16)}
Point = tuple[int, int, int]  # batch, text tokens, images of a sequence


def points(args: argparse.Namespace) -> list[Point]:
    """(batch, text tokens, images) in the order they are measured: of a sweep, the first point is part of each line."""
    batches, texts = args.batch or list(args.preset.batches), args.text or [args.preset.text_tokens]
    images = args.images or [1]
    if not args.sweep:
        return list(itertools.product(batches, texts, images))
    lines = [(b, texts[0], images[0]) for b in args.batch or SWEEP["batch"]]
    lines += [(batches[0], t, images[0]) for t in args.text or SWEEP["text"]]
    lines += [(batches[0], texts[0], i) for i in args.images or SWEEP["images"]]
    return list(dict.fromkeys(lines))


def memory_problem(preset: Preset, wanted: list[Point], device: str, option: str = "--preset") -> str | None:
    """Why not even the smallest point fits, from the sizes alone; None when it does."""
    from .memory import available_bytes

    item = 2 if device == "cuda" else 4
    need, smallest = min((preset.memory_bytes(batch, text, item, images), (batch, text, images))
                         for batch, text, images in wanted)  # fmt: skip
    available = available_bytes(device)
    if available is None or need <= available:
        return None
    return (
        f"{option}: {preset.name!r} at batch {smallest[0]} needs about {need / 2**30:.1f} GiB on "
        f"{device} and {available / 2**30:.1f} GiB are free; use a smaller preset or a larger device"
    )


def point_problem(preset: Preset, point: Point, device: str) -> str | None:
    """Why a point is not tried beside the loaded weights. Only on a CPU: there running out ends the process."""
    from .memory import available_bytes

    available = available_bytes(device)
    batch, text, images = point
    need = preset.activation_bytes(batch, text, 4, images)
    if device == "cuda" or available is None or need <= available:
        return None
    return f"does not fit into memory (about {need / 2**30:.1f} GiB needed, {available / 2**30:.1f} GiB free)"
