"""The least time a piece of work can take, from its operations, its bytes and the ceilings of a device.

    floor = max(operations / arithmetic ceiling, bytes / memory ceiling)
    a chain's floor is the sum of the floors of its stages

    python -m bench.roofline [--device NAME] [--preset 7b] [--batch N] [--text N]    floors of every stage of a prefill
    python -m bench.roofline --images-per-second X --device NAME                       GPUs and KV memory of a fleet

Ceilings are measured at the start of a run (a large copy, a large matrix product, random data); for devices
that are not here, `DEVICES` holds published ones. A floor is a bound, not a forecast: planning multiplies it by a
measured ratio.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import entry
from .arguments import positive_float, positive_int
from .presets import BLOCKS, PRESETS, Preset


@dataclass(frozen=True)
class Ceilings:
    """Dense 16-bit matrix FLOP/s, bytes/s of memory, bytes of memory, and where the numbers come from."""

    flops: float
    bandwidth: float
    memory: float
    source: str

    def seconds(self, flops: float, nbytes: float) -> float:
        return max(flops / self.flops, nbytes / self.bandwidth)

    def raised(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of one device: whatever else runs there only lowers them."""
        flops, bandwidth = max(self.flops, other.flops), max(self.bandwidth, other.bandwidth)
        return replace(self, flops=flops, bandwidth=bandwidth)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


BEATEN = 0.97  # of a floor; ceilings are known to a few percent


def beaten(rows: list[dict[str, Any]]) -> str | None:
    """What to say where a measurement is below its floor: not that the work was fast, but that the ceilings are low."""
    ratios = [row["floor_ratio"]["total_ms"] for row in rows if row["floor_ratio"]["total_ms"] is not None]
    if not ratios or min(ratios) >= BEATEN:
        return None
    return (
        f"a total is {min(ratios):.2f} of its floor: the machine was busier while its ceilings were measured, "
        "and every ratio to a floor is too low"
    )


_SHEET = "datasheet"
DEVICES = {
    "nvidia-a100-sxm4-80gb": Ceilings(312e12, 2.039e12, 80e9, _SHEET),
    "nvidia-h100-80gb-hbm3": Ceilings(989e12, 3.35e12, 80e9, _SHEET),
    "nvidia-h200": Ceilings(790e12, 4.3e12, 141e9, "measured on such a card"),
    "nvidia-l40s": Ceilings(362e12, 0.864e12, 48e9, _SHEET),
    "amd-instinct-mi300x": Ceilings(1307e12, 5.3e12, 192e9, _SHEET),
}


def measure_ceilings(device: str, dtype: Any = None, *, size: int | None = None) -> Ceilings:
    """A copy and a square matrix product through torch, best of a few, random data."""
    import torch

    from .memory import available_bytes

    gpu = device.startswith("cuda")
    dtype = dtype or (torch.bfloat16 if gpu else torch.float32)
    side = size or (8192 if gpu else 1536)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = _best_seconds(lambda: a @ b, device)
    source = torch.randn((1 << 28) if gpu else (1 << 24), device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    total = torch.cuda.mem_get_info()[1] if gpu else available_bytes(device)
    return Ceilings(
        2 * side**3 / product, 2 * source.numel() * source.element_size() / copy, float(total or 0),
        f"measured in this run, {str(dtype).removeprefix('torch.')}",
    )  # fmt: skip


def _best_seconds(call: Any, device: str) -> float:
    from .stages import Stopwatch

    best = math.inf
    for attempt in range(8):
        watch = Stopwatch(device)
        watch.mark("start")
        call()
        watch.mark("end")
        if device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        if attempt >= 2:
            best = min(best, watch.between("start", "end") / 1e3)
    return best


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one stage."""

    flops: float
    bytes: float


def linear(rows: float, inner: int, columns: int, item: int) -> Work:
    return Work(2.0 * rows * inner * columns, float(item) * (rows * inner + inner * columns + rows * columns))


def total(works: list[Work]) -> Work:
    return Work(sum(work.flops for work in works), sum(work.bytes for work in works))


def prefill_work(
    preset: Preset, *, model: str, batch: int, text_tokens: int, item: int, images: int = 1, layers: int | None = None
) -> dict[str, list[Work]]:
    """Each stage of a row as a list of pieces that cannot overlap. model: a row's name as in prefill.json.

    `images` of every sequence of the batch: the tower and the projector see batch * images of them.
    """
    compact = model in ("llava-stf", "llava-1.5-pool")
    image = images * preset.image_tokens(2 if compact else 1)
    depth = layers or (preset.vision_layers if model in ("llava-1.5", "llava-1.5-pool") else max(BLOCKS))
    tokens = batch * (image + text_tokens)
    return {
        "vision_ms": _vision(preset, batch * images, depth, item),
        "projector_ms": _projector(preset, batch * images, model, item),
        # embeddings read and written once, image rows written once
        "insert_ms": [Work(0, item * preset.dim * (2 * batch * text_tokens + 2 * batch * image))],
        "prefill_ms": _language(preset, batch, tokens, image + text_tokens, item),
    }


def _vision(preset: Preset, batch: int, depth: int, item: int) -> list[Work]:
    c, i, t = preset.vision_dim, preset.vision_intermediate, preset.grid**2 + 1
    rows = batch * t
    patches = linear(batch * preset.grid**2, 3 * preset.patch_size**2, c, item)
    attention = Work(4.0 * batch * t * t * c, item * 4.0 * rows * c)
    layer = [linear(rows, c, 3 * c, item), attention, linear(rows, c, c, item), linear(rows, c, i, item),
             linear(rows, i, c, item)]  # fmt: skip
    return [patches, *(layer * depth)]


def _projector(preset: Preset, batch: int, model: str, item: int) -> list[Work]:
    c, d, tokens = preset.vision_dim, preset.dim, batch * preset.image_tokens(1)
    if model != "llava-stf":
        return [linear(tokens, c, d, item), linear(tokens, d, d, item)]
    merged = batch * preset.image_tokens(2)
    return [
        linear(tokens, len(BLOCKS) * c, 4 * c, item), linear(tokens, 4 * c, c, item),
        linear(merged, 4 * c, 4 * d, item), linear(merged, 4 * d, d, item),
    ]  # fmt: skip


def _language(preset: Preset, batch: int, tokens: int, length: int, item: int) -> list[Work]:
    d, i, q, kv = preset.dim, preset.intermediate, preset.query_dim, preset.kv_dim
    # Causal attention reads half of the square.
    attention = Work(2.0 * batch * length * length * q, item * 2.0 * tokens * (q + kv))
    layer = [linear(tokens, d, q + 2 * kv, item), attention, linear(tokens, q, d, item),
             linear(tokens, d, 2 * i, item), linear(tokens, i, d, item)]  # fmt: skip
    return [*(layer * preset.layers), linear(batch, d, preset.vocabulary, item)]


def floors_ms(ceilings: Ceilings, work: dict[str, list[Work]]) -> dict[str, float]:
    """Milliseconds per stage, and their sum as total_ms."""
    floors = {
        stage: 1e3 * sum(ceilings.seconds(piece.flops, piece.bytes) for piece in pieces)
        for stage, pieces in work.items()
    }
    return {**floors, "total_ms": sum(floors.values())}


@dataclass(frozen=True)
class Fleet:
    """What a number of images per second takes, prefill only."""

    images_per_second_per_gpu: float
    gpus: int
    kv_bytes_per_image: float
    sequences_in_memory: int


def plan_fleet(
    preset: Preset, ceilings: Ceilings, *, model: str, batch: int, text_tokens: int, images_per_second: float,
    efficiency: float,
) -> Fleet:  # fmt: skip
    """`efficiency`: floor over measurement of the same row on such a device (1 would be a GPU at its ceilings)."""
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency: expected a number above 0 and at most 1, got {efficiency}")
    floor = floors_ms(ceilings, prefill_work(preset, model=model, batch=batch, text_tokens=text_tokens, item=2))
    each = batch / (floor["total_ms"] / efficiency / 1e3)
    image = preset.image_tokens(2 if model in ("llava-stf", "llava-1.5-pool") else 1)
    kv = preset.kv_bytes(image + text_tokens, 1, 2)
    weights = 2 * (preset.language_parameters + preset.vision_parameters + max(preset.projector_parameters.values()))
    room = max(0, ceilings.memory - weights)
    return Fleet(each, math.ceil(images_per_second / each), kv, int(room // kv))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description="Floors of a prefill, and fleets.")
    parser.add_argument("--device", choices=sorted(DEVICES), default="nvidia-h200")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="7b")
    parser.add_argument("--batch", type=positive_int, default=8, metavar="N")
    parser.add_argument("--text", type=positive_int, default=64, metavar="N", help="text tokens")
    parser.add_argument("--images-per-second", type=positive_float, metavar="X", help="size a fleet for this load")
    help_efficiency = "floor over measurement of a prefill run, at most 1"
    parser.add_argument("--efficiency", type=positive_float, default=1.0, metavar="F", help=help_efficiency)
    args = parser.parse_args(argv)
    if args.efficiency > 1:
        parser.error(f"argument --efficiency: expected at most 1, got {args.efficiency}")
    print(describe(args))
    return 0


def describe(args: argparse.Namespace) -> str:
    from .table import number, render

    preset, ceilings = PRESETS[args.preset], DEVICES[args.device]
    models = ("llava-1.5", "llava-1.5-skip", "llava-1.5-pool", "llava-stf")
    rows, fleets = [], []
    base = None
    for model in models:
        work = prefill_work(preset, model=model, batch=args.batch, text_tokens=args.text, item=2)
        floors = floors_ms(ceilings, work)
        base = base or floors["total_ms"]
        rows.append((model, *(number(floors[s], 2) for s in floors), f"{base / floors['total_ms']:.2f}x"))
        if args.images_per_second:
            fleet = plan_fleet(preset, ceilings, model=model, batch=args.batch, text_tokens=args.text,
                               images_per_second=args.images_per_second, efficiency=args.efficiency)  # fmt: skip
            fleets.append((
                model, number(fleet.images_per_second_per_gpu), str(fleet.gpus),
                number(fleet.kv_bytes_per_image / 2**20), str(fleet.sequences_in_memory),
            ))  # fmt: skip
    out = [
        f"{args.device}: {ceilings.flops / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.source}",
        f"{preset.name}, batch {args.batch}, {args.text} text tokens, 16 bit. Floors in ms: bounds, not measurements.",
        "",
        render(("model", "vision", "projector", "insert", "prefill", "total", "bound"), rows, left=1),
    ]  # fmt: skip
    if fleets:
        header = ("model", "images/s per GPU", "GPUs", "KV MB per image", "sequences in memory")
        out += ["", f"{args.images_per_second:g} images/s at {args.efficiency:.0%} of the floors, prefill only", "",
                render(header, fleets, left=1)]  # fmt: skip
    return "\n".join(out)


if __name__ == "__main__":
    entry.run(main)
