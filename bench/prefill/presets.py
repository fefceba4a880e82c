"""The sizes that are measured, and the memory they need.

cpu   the real vision tower and projector, and two layers of a language model of 7B width: every ratio is a real one
7b    LLaVA-1.5-7B          13b   LLaVA-1.5-13B          tiny   a toy for tests; its times mean nothing
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

BLOCKS = (23, 21, 18, 15, 12, 9, 6, 3)  # LLaVA-STF's, of a tower of 24 layers, deepest first
SWEEP = {"batch": (1, 2, 4, 8, 16, 32), "text": (64, 256, 1024), "images": (1, 4, 16)}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336}
CLIP_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 56}
# name -> width, MLP width, layers, heads and vocabulary of the language model, the tower, batch sizes, text tokens
SIZES = {
    "cpu": ((4096, 11008, 2, 32, 32064), CLIP_L, (1,), 40),
    "7b": ((4096, 11008, 32, 32, 32064), CLIP_L, (1, 8), 64),
    "13b": ((5120, 13824, 40, 40, 32064), CLIP_L, (1, 8), 64),
    "tiny": ((64, 96, 2, 4, 512), CLIP_TINY, (1,), 8),
}


class Preset(NamedTuple):
    """A LLaVA-1.5 as transformers describes it, and what is measured unless the user says otherwise."""

    name: str
    config: Any
    batches: tuple[int, ...] = (1,)
    text_tokens: int = 64

    @property
    def grid(self) -> int:
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def image_tokens(self, merge_size: int) -> int:
        return (self.grid // merge_size) ** 2

    @property
    def heads_dims(self) -> tuple[int, int]:
        """Widths of all queries and of all keys of a token."""
        text = self.config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return text.num_attention_heads * width, (text.num_key_value_heads or text.num_attention_heads) * width

    def kv_bytes(self, tokens: int, batch: int, item: int) -> int:
        return 2 * self.config.text_config.num_hidden_layers * tokens * self.heads_dims[1] * batch * item

    def weight_bytes(self, item: int) -> int:
        """Of all rows, which share tower and language model; LLaVA-STF's projector as the exact warm start needs it."""
        import torch
        from transformers import LlavaForConditionalGeneration

        with torch.device("meta"):
            stock = sum(p.numel() for p in LlavaForConditionalGeneration(self.config).parameters())
        c, d = self.config.vision_config.hidden_size, self.config.text_config.hidden_size
        return item * (stock + 4 * len(BLOCKS) * c * c + 4 * c * c + 16 * c * d + 4 * d * d)

    def activation_bytes(self, point: Point, item: int) -> int:
        """What a prompt adds to the weights: its cache, and a few buffers as wide as the widest that live at once."""
        text, vision = self.config.text_config, self.config.vision_config
        tokens = point.images * self.image_tokens(1) + point.text_tokens
        # The stock model keeps every hidden state of its tower.
        every_state = vision.num_hidden_layers * vision.hidden_size
        widest = max(3 * text.intermediate_size, 16 * vision.hidden_size, every_state)
        return self.kv_bytes(tokens, point.batch, item) + 2 * item * point.batch * tokens * widest


class CheckpointError(ValueError):
    """A folder that is no checkpoint of LLaVA-1.5, or half of one."""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def preset(name: str, **text_options: int) -> Preset:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    (width, mlp, layers, heads, vocabulary), tower, batches, text_tokens = SIZES[name]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=24, patch_size=14, **tower),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=vocabulary,
            **text_options,
        ),
        image_token_id=vocabulary - 8,
        image_seq_length=(tower["image_size"] // 14) ** 2,
        attn_implementation="sdpa",
    )
    return Preset(name, config, batches, text_tokens)


def preset_of(folder: Path) -> Preset:
    """The sizes of a LLaVA-1.5 checkpoint, from its config.json."""
    from transformers import LlavaConfig

    name = f"the config.json of {str(folder)!r}"
    try:
        config = LlavaConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{name} cannot be used: {first_line(error)}") from error
    vision, layer, strategy = config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy
    if layer not in (-2, vision.num_hidden_layers - 1) or strategy != "default":
        expected = "expected vision_feature_layer -2 and vision_feature_select_strategy 'default'"
        raise CheckpointError(f"{name}: {expected}, got {layer} and {strategy!r}")
    if vision.image_size // vision.patch_size % 2:
        got = f"got an image of {vision.image_size} in patches of {vision.patch_size}"
        raise CheckpointError(f"{name}: expected a grid that 2x2 windows divide, {got}")
    return Preset(folder.name, config)


class Point(NamedTuple):
    """One size that every row is measured at; `images` are those of one sequence."""

    batch: int
    text_tokens: int
    images: int = 1

    def __str__(self) -> str:
        return f"batch {self.batch}, text {self.text_tokens}" + f", {self.images} images" * (self.images > 1)


def points(args: argparse.Namespace, preset: Preset) -> list[Point]:
    """In the order they are measured: of a sweep, the first point is part of each line."""
    batches, texts = args.batch or list(preset.batches), args.text or [preset.text_tokens]
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
    need, smallest = min((preset.activation_bytes(point, item), point) for point in wanted)
    need, available = need + preset.weight_bytes(item), available_bytes(device)
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
