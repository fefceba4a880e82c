"""Operations and bytes of every stage of a row, and the least time they take (roofline.py)."""

from typing import Any

from ..roofline import Ceilings, Work, linear
from .presets import BLOCKS, Point, Preset


def prefill_work(preset: Preset, model: str, point: Point, item: int, layers: int) -> dict[str, list[Work]]:
    """Each stage as a list of pieces that cannot overlap. model: as in prefill.json; layers: those the tower runs."""
    compact = model in ("llava-stf", "llava-1.5-pool")
    image = point.images * preset.image_tokens(2 if compact else 1)
    photographs = point.batch * point.images
    # embeddings read and written once, image rows written once
    insert = Work(0, item * preset.config.text_config.hidden_size * 2 * point.batch * (point.text_tokens + image))
    return {
        "vision_ms": _vision(preset, photographs, layers, item),
        "projector_ms": _projector(preset, photographs, model, item),
        "insert_ms": [insert],
        "prefill_ms": _language(preset, point.batch, image + point.text_tokens, item),
    }


def _vision(preset: Preset, images: int, layers: int, item: int) -> list[Work]:
    vision, tokens = preset.config.vision_config, preset.grid**2 + 1
    c, i = vision.hidden_size, vision.intermediate_size
    rows = images * tokens
    patches = linear(images * preset.grid**2, 3 * vision.patch_size**2, c, item)
    attention = Work(4.0 * images * tokens * tokens * c, item * 4.0 * rows * c)
    mlp = [linear(rows, c, i, item), linear(rows, i, c, item)]
    return [patches, *(layers * [linear(rows, c, 3 * c, item), attention, linear(rows, c, c, item), *mlp])]


def _projector(preset: Preset, images: int, model: str, item: int) -> list[Work]:
    c, d = preset.config.vision_config.hidden_size, preset.config.text_config.hidden_size
    tokens = images * preset.image_tokens(1)
    if model != "llava-stf":
        return [linear(tokens, c, d, item), linear(tokens, d, d, item)]
    merged = images * preset.image_tokens(2)
    mbtf = [linear(tokens, len(BLOCKS) * c, 4 * c, item), linear(tokens, 4 * c, c, item)]
    return [*mbtf, linear(merged, 4 * c, 4 * d, item), linear(merged, 4 * d, d, item)]


def _language(preset: Preset, batch: int, length: int, item: int) -> list[Work]:
    text, rows, (q, kv) = preset.config.text_config, batch * length, preset.attention_widths
    d, i = text.hidden_size, text.intermediate_size
    # Causal attention reads half of the square.
    attention = Work(2.0 * rows * length * q, item * 2.0 * rows * (q + kv))
    mlp = [linear(rows, d, 2 * i, item), linear(rows, i, d, item)]
    layer = [linear(rows, d, q + 2 * kv, item), attention, linear(rows, q, d, item), *mlp]
    return [*(text.num_hidden_layers * layer), linear(batch, d, text.vocab_size, item)]


def with_floor(row: dict[str, Any], preset: Preset, ceilings: Ceilings, item: int) -> dict[str, Any]:
    """The row with the floor of each stage, and the ratio of what was measured to it."""
    point = Point(row["batch"], row["text_tokens"], row["images"])
    layers = preset.config.vision_config.num_hidden_layers - (row["model"] == "llava-1.5-skip")
    work = prefill_work(preset, row["model"], point, item, layers)
    floors = {stage: 1e3 * sum(map(ceilings.seconds, pieces)) for stage, pieces in work.items()}
    floors["total_ms"] = sum(floors.values())
    ratios = {stage: None if row[stage] is None else row[stage] / floor for stage, floor in floors.items()}
    return {**row, "floor_ms": floors, "floor_ratio": ratios}
