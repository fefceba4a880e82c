"""Operations and bytes of every stage of a row, and the least time they take (roofline.py)."""

from typing import Any

from ..roofline import Ceilings, Work, linear
from .presets import BLOCKS, Point, Preset, preset

# Dense bf16 and memory of the SXM module: data sheet, not measured.
H100 = Ceilings(989e12, 3.35e12, "data sheet")


def prefill_work(preset: Preset, model: str, point: Point, item: int) -> dict[str, list[Work]]:
    """Each stage as a list of pieces that cannot overlap. model: as in prefill.json."""
    vision, text = preset.config.vision_config, preset.config.text_config
    c, mlp, patches, windows = vision.hidden_size, vision.intermediate_size, preset.grid**2, preset.merge_size**2
    tokens = patches + (vision.model_type == "clip_vision_model")
    d, wide, (q, kv) = text.hidden_size, text.intermediate_size, preset.attention_widths
    photographs = point.batch * point.images * preset.tiles
    compact = model.endswith(("-stf", "-pool"))

    rows = photographs * tokens
    attention = Work(4.0 * rows * tokens * c, item * 4.0 * rows * c)
    layer = [linear(rows, c, 3 * c, item), attention, linear(rows, c, c, item)]
    layer += [linear(rows, c, mlp, item), linear(rows, mlp, c, item)]
    layers = vision.num_hidden_layers - (model == "llava-1.5-skip")
    if preset.size and compact:  # the model as its users call it
        layers += preset.config.vision_feature_layer + 1
    tower = [linear(photographs * patches, 3 * vision.patch_size**2, c, item), *(layers * layer)]

    rows, merged = photographs * patches, photographs * (preset.grid // preset.merge_size) ** 2
    projector = [linear(rows, c, d, item), linear(rows, d, d, item)]
    if model.endswith("-stf"):
        projector = [linear(rows, len(BLOCKS) * c, 4 * c, item), linear(rows, 4 * c, c, item)]
        projector += [linear(merged, windows * c, windows * d, item), linear(merged, windows * d, d, item)]

    length = point.images * preset.image_tokens(preset.merge_size if compact else 1) + point.text_tokens
    rows = point.batch * length
    # Causal attention reads half of the square.
    attention = Work(2.0 * rows * length * q, item * 2.0 * rows * (q + kv))
    layer = [linear(rows, d, q + 2 * kv, item), attention, linear(rows, q, d, item)]
    layer += [linear(rows, d, 2 * wide, item), linear(rows, wide, d, item)]
    language = [*(text.num_hidden_layers * layer), linear(point.batch, d, text.vocab_size, item)]
    # embeddings read and written once, image rows written once
    insert = [Work(0, item * d * 2 * rows)]
    return {"vision_ms": tower, "projector_ms": projector, "insert_ms": insert, "prefill_ms": language}


def with_floor(row: dict[str, Any], preset: Preset, ceilings: Ceilings, item: int) -> dict[str, Any]:
    """The row with the floor of each stage, and the ratio of what was measured to it."""
    point = Point(row["batch"], row["text_tokens"], row["images"])
    work = prefill_work(preset, row["model"], point, item)
    floors = {stage: 1e3 * sum(map(ceilings.seconds, pieces)) for stage, pieces in work.items()}
    floors["total_ms"] = sum(floors.values())
    ratios = {stage: None if row[stage] is None else row[stage] / floor for stage, floor in floors.items()}
    return {**row, "floor_ms": floors, "floor_ratio": ratios}


def cost_on_a_gpu(small: Preset) -> str:
    """The least time of the family's 7B for the same photograph: what the tokens alone can bring, calculated."""
    whole, point = preset("7b", small.family, small.size), Point(1, 64)
    totals, counts = [], [whole.image_tokens(r) for r in (1, whole.merge_size)]
    for model in (small.family, f"{small.family}-stf"):
        pieces = [piece for stage in prefill_work(whole, model, point, 2).values() for piece in stage]
        totals.append(1e3 * sum(map(H100.seconds, pieces)))
    least = "{:.1f} ms with {} image tokens and {:.1f} ms with {}, {:.2f}x"
    least = least.format(totals[0], counts[0], totals[1], counts[1], totals[0] / totals[1])
    return f"calculated, not measured: on an H100 at its data sheet's ceilings {small.family} 7B in bf16 takes {least}"
