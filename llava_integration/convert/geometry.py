"""Blocks, window and widths of an official LLaVA-STF projector, from the shapes of its tensors.

mm_projector_crosslayer.0 [H1, M*C]   .2 [C, H1]        MBTF; absent in a model with STF alone
mm_projector.0            [H2, r*r*C] .2 [D, H2]        STF, channel-major
"""

import math
import re
from dataclasses import dataclass

from ..configuration import resolve_layers
from .checkpoint import Entries
from .errors import ConversionError

PROJECTOR = re.compile(r"^(?:.*\.)?(mm_projector(?:_crosslayer)?)\.([02])\.(weight|bias)$")
CHILDREN = {"mm_projector_crosslayer": "mbtf", "mm_projector": "stf"}
LINEARS = {"0": "linear_1", "2": "linear_2"}
PREFIX = "model.multi_modal_projector."
RELAID_OUT = PREFIX + "stf.linear_1.weight"

PUBLISHED_SELECT = -2


def published_blocks(layers: int) -> list[int]:
    """The rule of the published model, whose config.json does not name its blocks: all multiples of three behind the
    layer before the last, deepest first. 24 layers -> [23, 21, 18, 15, 12, 9, 6, 3]."""
    selected = layers + 1 + PUBLISHED_SELECT
    return [selected, *range((selected - 1) // 3 * 3, 0, -3)]


@dataclass(frozen=True)
class Geometry:
    """M blocks of C channels, window r, output width D."""

    blocks: int
    channels: int
    merge_size: int
    width: int
    mbtf_hidden: int | None  # None: no MBTF
    stf_hidden: int
    bias: bool


def projector_name(name: str) -> str | None:
    """model.mm_projector.0.weight -> model.multi_modal_projector.stf.linear_1.weight; None for anything else."""
    found = PROJECTOR.match(name)
    return found and f"{PREFIX}{CHILDREN[found[1]]}.{LINEARS[found[2]]}.{found[3]}"


def derive(entries: Entries, channels: int) -> Geometry:
    """Sizes of the projector among `entries`, under the model's names, behind a tower of `channels` channels."""
    stf_1, stf_2 = (_shape(entries, f"stf.linear_{i}.weight") for i in (1, 2))
    mbtf_1, mbtf_2 = (_shape(entries, f"mbtf.linear_{i}.weight") for i in (1, 2))
    if stf_1 is None or stf_2 is None:
        raise ConversionError(
            "SRC: expected an official LLaVA-STF checkpoint with mm_projector.{0,2}.weight and "
            f"mm_projector_crosslayer.{{0,2}}.weight, got tensors such as {', '.join(list(entries)[:3])}; a LLaVA-1.5 "
            "folder of transformers is converted with `llava`"
        )
    if (mbtf_1 is None) != (mbtf_2 is None):
        raise ConversionError(
            "SRC: expected both of mm_projector_crosslayer.{0,2}.weight, got one of them; it is truncated"
        )
    if mbtf_1 is None and stf_1[1] == channels:
        raise ConversionError(
            "SRC: mm_projector reads single tokens and there is no mm_projector_crosslayer, so this is LLaVA-1.5, not "
            "LLaVA-STF; convert its transformers version with `llava`"
        )
    blocks = 1 if mbtf_1 is None else _multiple(mbtf_1[1], channels, "mm_projector_crosslayer.0.weight")
    area = _multiple(stf_1[1], channels, "mm_projector.0.weight")
    merge_size = math.isqrt(area)
    if merge_size**2 != area:
        raise ConversionError(f"SRC: mm_projector.0.weight: expected a square window of tokens, got {area} tokens")
    biases = sum(name.startswith(PREFIX) and name.endswith(".bias") for name in entries)
    return Geometry(
        blocks=blocks,
        channels=channels,
        merge_size=merge_size,
        width=stf_2[0],
        mbtf_hidden=None if mbtf_1 is None else mbtf_1[0],
        stf_hidden=stf_1[0],
        bias=biases > 0,  # some of them only: the rest is missing
    )


def block_layers(geometry: Geometry, layers: int, selected: object, given: list[int] | None) -> list[int]:
    """The tower's layers in concatenation order: as given, as config.json lists them, or by the published rule."""
    if given is not None:
        blocks = _resolved(given, layers, "--blocks")
        if len(blocks) != geometry.blocks:
            raise ConversionError(
                f"--blocks: expected {geometry.blocks} layers, as many as mm_projector_crosslayer.0.weight reads, "
                f"got {given}"
            )
        return blocks
    if isinstance(selected, list) and len(selected) == geometry.blocks:
        return _resolved(selected, layers, "SRC: config.json: mm_vision_select_layer")
    selected = -2 if selected is None else selected
    if geometry.blocks == 1 and isinstance(selected, int):
        return [selected]
    published = published_blocks(layers)
    if selected == PUBLISHED_SELECT and len(published) == geometry.blocks:
        return published
    raise ConversionError(
        f"--blocks: the checkpoint does not name its {geometry.blocks} blocks of a tower of {layers} layers, and the "
        f"rule of the published model, {published} behind layer {PUBLISHED_SELECT}, does not give them; name them, "
        "e.g. --blocks 5,3,1 with the first of the concatenation first"
    )


def _resolved(blocks: object, layers: int, name: str) -> list[int]:
    try:
        return resolve_layers(blocks, layers, name)
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from error


def _shape(entries: Entries, name: str) -> tuple[int, ...] | None:
    entry = entries.get(PREFIX + name)
    if entry is not None and len(entry.shape) != 2:
        raise ConversionError(f"SRC: {PREFIX + name}: expected a matrix, got shape {list(entry.shape)}")
    return entry and entry.shape


def _multiple(columns: int, channels: int, name: str) -> int:
    if columns % channels:
        raise ConversionError(
            f"SRC: {name}: expected columns in multiples of the vision tower's {channels} channels, got {columns}; "
            "name the right tower with --vision-tower DIR"
        )
    return columns // channels
