"""A run: build the rows; for every mode and point warm up, check that outputs agree, then take interleaved rounds.

Round i runs every row once, starting with another row each time, so drift of clocks or of a busy machine meets all rows
alike, and a speed-up is a ratio of neighbours in time.
"""

import functools
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import agreement, results
from ..command import Progress
from ..meters import MB, weight_bytes
from ..roofline import measure_ceilings
from ..stats import spread_percent
from . import models
from .floors import with_floor
from .modes import MODES, Eager, Output
from .presets import Point, first_line, points, shortage
from .speedup import compare_rows, refusal, speedup_field
from .stages import STAGES

# row -> the row whose outputs it must repeat
TWINS = {
    "llava-stf/fused": "llava-stf/reference",
    "llava-1.5-skip/mlp2x": "llava-1.5/mlp2x",
}
BROKEN = "does not work here"


@dataclass
class Cell:
    """One row at one point in one mode, with every raw sample."""

    row: models.Row
    point: Point
    mode: str
    device: str
    failed: str | None = None
    run: Eager | None = None
    output: Output | None = None
    warm_up_s: float | None = None
    samples: list[dict[str, float | None]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The row of prefill.json: medians, and beside them the samples they come from."""
        row, output, weights = self.row, self.output, weight_bytes(self.row.module)
        samples = {name: [sample[name] for sample in self.samples] for name in (*STAGES, "total_ms")}
        times = {name: median(series) if series and None not in series else None for name, series in samples.items()}
        total, projector = times["total_ms"], times["projector_ms"]
        found = {"model": row.model, "projector": row.projector, "mode": self.mode, **self.point._asdict(), **times}
        return found | {
            "image_tokens": self.point.images * row.image_tokens,
            "projector_share": projector / total if total and projector is not None else None,
            "spread_percent": spread_percent(samples["total_ms"]) if self.samples else None,
            "rounds": len(self.samples),
            "peak_mb": (weights + output.peak_bytes) / MB if output else None,
            "weights_mb": weights / MB,
            "kv_mb": output.kv_bytes / MB if output else None,
            "warm_up_s": self.warm_up_s,
            "failed": self.failed,
            "samples": samples,
        }


def is_broken(row: dict[str, Any]) -> bool:
    """Whether a row of a result ended in an error that it should not. torch.compile is a mode where it works."""
    return row["mode"] != "compile" and BROKEN in (row["failed"] or "")


def warm_up(cell: Cell, inputs: dict[str, torch.Tensor]) -> None:
    """The first run is watched for memory and for its outputs; two more follow on a GPU."""
    start = time.monotonic()
    try:
        cell.run = MODES[cell.mode](cell.row, inputs, cell.device)
        cell.output = cell.run.output()
        for _ in range(2 if cell.device == "cuda" else 0):
            cell.run.run()
        cell.warm_up_s = time.monotonic() - start
    except (torch.OutOfMemoryError, MemoryError) as error:
        cell.failed, cell.run = f"does not fit into memory ({first_line(error)})", None
        free(cell.device)
    except Exception as error:  # a defect of one row must not cost the others'
        traceback.print_exc()
        cell.failed, cell.run = f"{cell.mode} {BROKEN} ({first_line(error)})", None


def free(device: str) -> None:
    """A captured graph holds its memory, and the next point may need it."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def agreements(cells: list[Cell], eager: dict[str, Output]) -> list[dict[str, Any]]:
    """Twins against each other; in other modes also each row against its own eager outputs.

    Image features are read where they end, in the language model's inputs_embeds. So insertion is compared too, and a
    captured prefill, whose logits alone would hide a small error behind a whole language model.
    """
    outputs = {cell.row.name: cell.output for cell in cells if cell.output is not None}
    pairs = [(f"{a} against {b}", outputs.get(a), outputs.get(b), agreement.FEATURES) for a, b in TWINS.items()]
    if cells[0].mode != "eager":
        across = agreement.ACROSS
        pairs += [(f"{name} against its eager run", ours, eager.get(name), across) for name, ours in outputs.items()]
    checks, where = [], f"{cells[0].point}, {cells[0].mode}"
    for title, ours, theirs, bounds in pairs:
        if ours is None or theirs is None:
            continue
        if ours.features is not None and theirs.features is not None:
            name = f"image features, {title}, {where}"
            checks.append(agreement.compare(name, ours.features, theirs.features, bounds))
        checks.append(agreement.compare(f"logits, {title}, {where}", ours.logits, theirs.logits, agreement.LOGITS))
    return checks


def take_round(cells: list[Cell], index: int) -> None:
    """Every row once, in an order that rotates."""
    running = [cell for cell in cells if cell.run]
    shift = index % len(running)
    for cell in running[shift:] + running[:shift]:
        cell.samples.append(cell.run.run())


def take_rounds(take: Callable[[int], None], *, fewest: int, most: int, until: float) -> int:
    """At least `fewest` rounds, at most `most`, none begun that would end after `until`; how many there were."""
    longest = 0.0
    for index in range(most):
        start = time.monotonic()
        if index >= fewest and start + longest > until:
            return index
        take(index)
        longest = max(longest, time.monotonic() - start)
    return most


class Run:
    """Measures into `result`, and saves it to `path` after every round."""

    def __init__(self, args: Any, device: str, until: float, path: Path, flags: dict[str, Any]) -> None:
        self.args, self.preset, self.device, self.until, self.path = args, args.preset, device, until, path
        self.gpu = device == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.plan = [(mode, point) for point in points(args, args.preset) for mode in args.modes]
        self.fewest, self.most = (args.rounds, args.rounds) if args.rounds else (2, 20 if self.gpu else 6)
        self.process = models.image_processor(self.preset)
        self.cells: list[Cell] = []
        self.eager: dict[Point, dict[str, Output]] = {}
        tf32 = torch.backends.cuda.matmul.allow_tf32
        self.result = results.describe("prefill", device) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "preset": self.preset.name,
            "attention": "sdpa",
            "weights": f"{args.model.name}, LLaVA-STF's projector random" if args.model else "random",
            "output_tokens": 1,
            "command": ["python", "-m", "bench.prefill", *sys.argv[1:]],
            "flags": {**flags, "threads": torch.get_num_threads(), "tf32": tf32},
            "checks": [],
            "rows": [],
            "clocks_mhz": [],
        }

    def save(self) -> None:
        results.check(self.result, str(self.path))
        results.write(self.path, self.result)

    def measure(self) -> None:
        self.bar = Progress(2 + len(self.plan) * ((5 if self.args.full else 3) + self.most))
        notes, longest = self.result["notes"], 0.0
        with self.bar, torch.no_grad():
            self.bar.step("measuring the ceilings of this device")
            self.ceilings = measure_ceilings(self.device, self.dtype)
            self.build()
            for index, (mode, point) in enumerate(self.plan):
                start, later = time.monotonic(), len(self.plan) - index - 1
                if index and start + longest > self.until:
                    why = "not measured, the time budget ended before; --budget SECONDS raises it"
                    notes.append(f"{mode}, {point}: {why}")
                    continue
                cells = self.warm_up(mode, point)
                now = time.monotonic()
                longest = max(longest, now - start)
                # What is left is shared out evenly, after the warm-ups that are still to come.
                self.rounds(cells, now + (self.until - now - later * longest) / (later + 1))
        self.result["complete"] = not any("not measured" in note for note in notes)
        self.save()

    def build(self) -> None:
        """The rows, after a check of the exact warm start against the stock model's pooled image features."""
        args, factory = self.args, {"device": self.device, "dtype": self.dtype}
        self.bar.step(f"building LLaVA-1.5 ({self.preset.name}), weights: {self.result['weights']}")
        stock = models.load_stock(args.model, **factory) if args.model else models.build_stock(self.preset, **factory)
        self.rows = models.build_rows(stock, self.preset, full=args.full)
        pixels, fresh = self.process(args.image, 1).to(**factory), self.rows[-1].module.model
        warm, pooled = (torch.stack([*m.get_image_features(pixels).pooler_output]) for m in (fresh, stock.model))
        pooled, name = models.pool_tokens(pooled, self.preset.grid), "warm start against the pooled stock projector"
        self.result["checks"].append(agreement.compare(name, warm, pooled, agreement.FEATURES))
        # From here on dense random weights: the warm start's zeros could run faster than a trained projector.
        models.randomise(fresh.multi_modal_projector, 1)

    def warm_up(self, mode: str, point: Point) -> list[Cell]:
        pixels = self.process(self.args.image, point.batch * point.images)

        @functools.cache
        def inputs(image_tokens: int) -> dict[str, torch.Tensor]:
            return models.build_inputs(self.preset, pixels, point, image_tokens, device=self.device, dtype=self.dtype)

        too_large = None
        # Only on a CPU: there running out of memory ends the process.
        if not self.gpu and (short := shortage(self.preset.activation_bytes(point, 4), self.device)):
            too_large = f"does not fit into memory (about {short[0]} needed, {short[1]} free)"
        cells = [Cell(row, point, mode, self.device, too_large) for row in self.rows]
        self.cells += cells
        for cell in cells:
            self.bar.step(f"{mode}, {point}: warm-up of {cell.row.name}")
            if mode == "compile" and time.monotonic() > self.until:
                cell.failed = cell.failed or "not compiled, the time budget ended before"
            if not cell.failed:
                warm_up(cell, inputs(cell.row.image_tokens))
        self.result["checks"] += agreements(cells, self.eager.get(point, {}))
        if mode == "eager":
            self.eager[point] = {cell.row.name: cell.output for cell in cells if cell.output is not None}
        self.publish()
        return cells

    def rounds(self, cells: list[Cell], until: float) -> None:
        mode, point = cells[0].mode, cells[0].point
        if not any(cell.run for cell in cells):
            return

        def take(index: int) -> None:
            self.bar.step(f"{mode}, {point}: round {index + 1} of {self.most}")
            take_round(cells, index)
            if not self.gpu:  # others use a CPU too, and a ceiling is what it does when they do not
                self.ceilings = self.ceilings.raised(measure_ceilings(self.device, self.dtype))
            self.publish()

        taken = take_rounds(take, fewest=self.fewest, most=self.most, until=until)
        if self.gpu:  # right behind the work: before it, a GPU idles at a clock of its own
            self.result["clocks_mhz"].append(results.clock_mhz())
        if taken < self.most:
            planned = f"{taken} rounds fitted into the time budget, {self.most} were planned"
            self.result["notes"].append(f"{mode}, {point}: {planned}; --budget SECONDS or --rounds N takes more")
        for cell in cells:
            cell.run = None
        free(self.device)

    def publish(self) -> None:
        """Speed-ups from the rows measured so far, or the reason why there are none, into the file."""
        result, item = self.result, self.dtype.itemsize
        result["ceilings"] = asdict(self.ceilings)
        result["rows"] = [with_floor(cell.as_dict(), self.preset, self.ceilings, item) for cell in self.cells]
        result["refused"] = refusal(result["checks"])
        result["comparisons"] = [] if result["refused"] else compare_rows(result["rows"])
        result["speedup"] = speedup_field(result["comparisons"])
        self.save()
