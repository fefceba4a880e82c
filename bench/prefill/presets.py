"""The sizes that are measured (presets.json, in transformers' words), and the memory they need.

cpu   the real vision tower and projector, and two layers of a language model of 7B width: every ratio is a real one
small 3/16 of LLaVA-1.5-7B's widths, half of its language model's layers: for a server on a CPU
7b    the family's 7B       13b   its 13B                tiny   a toy for tests; its times mean nothing

LLaVA-NeXT and LLaVA-OneVision cut the photograph into tiles; how many, and how many tokens, follows from its size.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..command import BadInput
from ..results import first_line

BLOCKS = (23, 21, 18, 15, 12, 9, 6, 3)  # LLaVA-STF's, of a tower of 24 layers, deepest first
_SIZES = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
# family -> its model_type, the window that it starts with, its presets
FAMILIES = _SIZES["families"]


class Point(NamedTuple):
    """One size that every row is measured at; `images` are those of one sequence."""

    batch: int
    text_tokens: int
    images: int = 1

    def __str__(self) -> str:
        return f"batch {self.batch}, text {self.text_tokens}" + f", {self.images} images" * (self.images > 1)


class Preset(NamedTuple):
    """A LLaVA as transformers describes it, and what is measured unless the user says otherwise."""

    name: str
    config: Any
    batches: tuple[int, ...] = (1,)
    text_tokens: int = 64
    family: str = "llava-1.5"
    size: tuple[int, int] | None = None  # (height, width) of the photograph, for a family that cuts it into tiles

    @property
    def merge_size(self) -> int:
        return FAMILIES[self.family]["merge_size"]

    @property
    def side(self) -> int:
        return self.config.vision_config.image_size

    @property
    def grid(self) -> int:
        return self.side // self.config.vision_config.patch_size

    @property
    def tiles(self) -> int:
        """Images that the tower sees for a photograph."""
        if self.size is None:
            return 1
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(self.size, self.config.image_grid_pinpoints, self.side)

    def kind(self, what: str) -> Any:
        """The family's own class of transformers, such as LlavaNextProcessor."""
        import transformers

        return getattr(transformers, self.config.model_type.title().replace("_", "") + what)

    def image_tokens(self, merge_size: int) -> int:
        tokens = (self.grid // merge_size) ** 2
        if self.size is None:
            return tokens
        counter = object.__new__(self.kind("Processor"))  # of nothing but what it counts by
        patch = self.config.vision_config.patch_size * merge_size
        vars(counter).update(patch_size=patch, num_additional_image_tokens=0, num_image_tokens=tokens)
        vars(counter).update(image_processor=self.config, vision_aspect_ratio="anyres_max_9")
        return counter._get_number_of_features(*self.size, self.side, self.side)

    @property
    def attention_widths(self) -> tuple[int, int]:
        """Of all queries of a token, and of all its keys."""
        text = self.config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return text.num_attention_heads * width, (text.num_key_value_heads or text.num_attention_heads) * width

    def weight_bytes(self, item: int) -> int:
        """Of all rows, which share tower and language model; LLaVA-STF's projector as the exact warm start needs it."""
        import torch
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            stock = sum(p.numel() for p in AutoModelForImageTextToText.from_config(self.config).parameters())
        c, d, windows = self.config.vision_config.hidden_size, self.config.text_config.hidden_size, self.merge_size**2
        return item * (stock + 4 * len(BLOCKS) * c * c + 4 * c * c + windows * (windows * c * d + d * d))

    def activation_bytes(self, point: Point, item: int) -> int:
        """What a prompt adds to the weights: its cache, and a few buffers as wide as the widest that live at once."""
        text, vision = self.config.text_config, self.config.vision_config
        tokens = point.batch * (point.images * self.tiles * self.grid**2 + point.text_tokens)
        # The stock model keeps every hidden state of its tower.
        every_state = vision.num_hidden_layers * vision.hidden_size
        widest = max(3 * text.intermediate_size, 16 * vision.hidden_size, every_state)
        return 2 * item * tokens * (text.num_hidden_layers * self.attention_widths[1] + widest)


def preset(name: str, family: str = "llava-1.5", size: tuple[int, int] | None = None, **text_options: int) -> Preset:
    """`size`: (height, width) of the photograph."""
    from transformers import AutoConfig

    sizes, model_type = FAMILIES[family]["presets"][name], FAMILIES[family]["model_type"]
    text = _SIZES["text"][sizes["text"]] | text_options
    options = {"vision_config": _SIZES["vision"][sizes["vision"]], "text_config": text}
    options |= {"image_token_id": text["vocab_size"] - 8, "attn_implementation": "sdpa"}
    config = AutoConfig.for_model(model_type, **options)
    found = Preset(name, config, tuple(sizes["batches"]), sizes["text_tokens"], family)
    if not hasattr(config, "image_grid_pinpoints"):
        return found
    pinpoints = config.image_grid_pinpoints  # in sides of the real tower
    config.image_grid_pinpoints = [[pixels // min(pinpoints[0]) * found.side for pixels in one] for one in pinpoints]
    return found._replace(size=size)


def preset_of(folder: Path) -> Preset:
    """The sizes of a LLaVA-1.5 checkpoint, from its config.json."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "llava":
            raise ValueError(f"expected a checkpoint of model_type 'llava', got {config.model_type!r}")
        layers, found = config.vision_config.num_hidden_layers, Preset(folder.name, config)
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if layer not in (-2, layers - 1) or strategy != "default" or found.grid % 2:
            expected = "expected vision_feature_layer -2, vision_feature_select_strategy 'default' and an even grid"
            raise ValueError(f"{expected}, got {layer}, {strategy!r} and {found.grid}x{found.grid} patches")
        return found
    except Exception as error:
        raise BadInput(f"--model: the config.json of {str(folder)!r} cannot be used: {first_line(error)}") from error


def points(args: argparse.Namespace, preset: Preset) -> list[Point]:
    """Every value of one option with every value of the others, in the order they are measured."""
    values = args.batch or preset.batches, args.text or [preset.text_tokens], args.images or [1]
    return list(itertools.starmap(Point, itertools.product(*values)))
