"""A run: build the rows; for every mode and point warm up, check that outputs agree, then take interleaved rounds.

Round i runs every row once, starting with another row each time, so drift of clocks or of a busy machine meets all rows
alike, and a speed-up is a ratio of neighbours in time.
"""

from __future__ import annotations

import functools
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from .. import agreement
from ..command import Progress
from ..meters import MB, weight_bytes
from ..results import clock_mhz
from ..roofline import beaten, measure_ceilings
from ..stats import spread_percent
from . import models
from .floors import with_floor
from .modes import MODES, Eager, Output
from .presets import Point, first_line, point_problem, points
from .speedup import compare_rows, refusal, speedup_field
from .stages import STAGES

# row -> the row whose outputs it must repeat
TWINS = {
    "llava-stf/fused": "llava-stf/reference",
    "llava-stf/fused+savings": "llava-stf/fused",
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
    preprocess: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The row of prefill.json: medians, and beside them the samples they come from."""
        row, output, weights = self.row, self.output, weight_bytes(self.row.module)
        samples = {stage: [sample[stage] for sample in self.samples] for stage in (*STAGES, "total_ms")}
        times = {stage: _median(values) for stage, values in samples.items()}
        total, projector = times["total_ms"], times["projector_ms"]
        return {
            "model": row.model,
            "projector": row.projector,
            "mode": self.mode,
            **self.point._asdict(),
            "image_tokens": self.point.images * row.image_tokens,
            "savings": row.savings(self.mode, self.device),
            **times,
            "preprocess_ms": _median(self.preprocess),
            "decode_ms_per_token": _median(self.decode),
            "projector_share": projector / total if total and projector is not None else None,
            "spread_percent": spread_percent(samples["total_ms"]) if self.samples else None,
            "rounds": len(self.samples),
            "peak_mb": (weights + output.peak_bytes) / MB if output else None,
            "weights_mb": weights / MB,
            "kv_mb": output.kv_bytes / MB if output else None,
            "first_tokens": output.tokens if output else None,
            "warm_up_s": self.warm_up_s,
            "failed": self.failed,
            "samples": samples,
            "preprocess_samples": self.preprocess,
            "decode_samples": self.decode,
        }


def _median(samples: list[float | None]) -> float | None:
    return median(samples) if samples and None not in samples else None


def is_broken(row: dict[str, Any]) -> bool:
    """Whether a row of a result ended in an error that it should not. torch.compile is a mode where it works."""
    return row["mode"] != "compile" and BROKEN in (row["failed"] or "")


def warm_up(cell: Cell, inputs: models.Inputs) -> None:
    """The first run is watched for memory and for its outputs; two more follow on a GPU."""
    start, out_of_memory = time.monotonic(), (torch.OutOfMemoryError, MemoryError)
    try:
        cell.run = MODES[cell.mode](cell.row, inputs, cell.device)
        cell.output = cell.run.output()
        for _ in range(2 if cell.device == "cuda" else 0):
            cell.run.run()
        cell.warm_up_s = time.monotonic() - start
    except Exception as error:  # a defect of one row must not cost the others'
        reason, cell.run = first_line(error), None
        if isinstance(error, out_of_memory):
            cell.failed = f"does not fit into memory ({reason})"
            free(cell.device)
        else:
            traceback.print_exc()
            cell.failed = f"{cell.mode} {BROKEN} ({reason})"


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
    where = f"{cells[0].point}, {cells[0].mode}"
    pairs = [
        (f"{name} against {other}", outputs[name], outputs[other], agreement.FEATURES)
        for name, other in TWINS.items()
        if name in outputs and other in outputs
    ]
    if cells[0].mode != "eager":
        pairs += [
            (f"{name} against its eager run", output, eager[name], agreement.ACROSS)
            for name, output in outputs.items()
            if name in eager
        ]
    checks = []
    for title, ours, theirs, bounds in pairs:
        if ours.features is not None and theirs.features is not None:
            name = f"image features, {title}, {where}"
            checks.append(agreement.compare(name, ours.features, theirs.features, bounds))
        checks.append(agreement.compare(f"logits, {title}, {where}", ours.logits, theirs.logits, agreement.LOGITS))
    return checks


def take_round(cells: list[Cell], index: int, preprocess: Callable[[], Any], decode_tokens: int) -> None:
    """Every row once, in an order that rotates."""
    running = [cell for cell in cells if cell.run]
    shift = index % len(running)
    for cell in running[shift:] + running[:shift]:
        start = time.perf_counter()
        preprocess()
        cell.preprocess.append(1e3 * (time.perf_counter() - start))
        cell.samples.append(cell.run.run())
        if decode_tokens and cell.mode == "eager":
            cell.decode.append(cell.run.decode(decode_tokens))


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
    """Measures into `result`, calling `save` after every round."""

    def __init__(self, args: Any, device: str, until: float, result: dict[str, Any], save: Callable[[], None]) -> None:
        self.args, self.preset, self.device, self.until = args, args.preset, device, until
        self.result, self.save, self.gpu = result, save, device == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.points = points(args, args.preset)
        self.plan = [(mode, point) for point in self.points for mode in args.modes]
        self.fewest, self.most = (args.rounds, args.rounds) if args.rounds else (2, 20 if self.gpu else 6)
        self.process = models.image_processor(self.preset)
        self.cells: list[Cell] = []
        self.eager: dict[Point, dict[str, Output]] = {}

    def measure(self) -> None:
        self.bar = Progress(2 + len(self.plan) * ((6 if self.args.full else 3) + self.most))
        with self.bar, torch.no_grad():
            self.bar.now("measuring the ceilings of this device")
            self.ceilings = measure_ceilings(self.device, self.dtype)
            self.build()
            longest, done = 0.0, 0
            for index, (mode, point) in enumerate(self.plan):
                start = time.monotonic()
                if index and start + longest > self.until:
                    self.note(
                        f"{mode}, {point}: not measured, the time budget ended before; --budget SECONDS raises it"
                    )
                    continue
                cells = self.warm_up(mode, point)
                now, later = time.monotonic(), len(self.plan) - index - 1
                longest, done = max(longest, now - start), done + 1
                # What is left is shared out evenly, after the warm-ups that are still to come.
                self.rounds(cells, now + (self.until - now - later * longest) / (later + 1))
            self.bar.now("done")
        totals = [row["floor_ratio"]["total_ms"] for row in self.result["rows"]]
        if low := beaten([ratio for ratio in totals if ratio is not None]):
            self.note(low)
        self.result["complete"] = done == len(self.plan)
        self.save()

    def note(self, text: str) -> None:
        self.result["notes"].append(text)

    def build(self) -> None:
        """The rows, after a check of the exact warm start against the stock model's pooled image features."""
        args, factory = self.args, {"device": self.device, "dtype": self.dtype}
        self.bar.step()
        self.bar.now(f"building LLaVA-1.5 ({self.preset.name}), weights: {self.result['weights']}")
        stock = models.load_stock(args.model, **factory) if args.model else None
        stock = stock or models.build_stock(self.preset, **factory, seed=0)
        self.rows = models.build_rows(stock, self.preset, full=args.full)
        pixels, fresh = self.process(args.image, 1).to(**factory), self.rows[-1].module.model
        warm, pooled = (torch.stack([*m.get_image_features(pixels).pooler_output]) for m in (fresh, stock.model))
        pooled, name = models.pool_tokens(pooled, self.preset.grid), "warm start against the pooled stock projector"
        self.result["checks"].append(agreement.compare(name, warm, pooled, agreement.FEATURES))
        # From here on dense random weights: the warm start's zeros could run faster than a trained projector.
        models.randomise(fresh.multi_modal_projector, 1)
        self.bar.step()

    def warm_up(self, mode: str, point: Point) -> list[Cell]:
        pixels = self.process(self.args.image, point.batch * point.images)

        @functools.cache
        def inputs(image_tokens: int) -> models.Inputs:
            return models.build_inputs(self.preset, pixels, point, image_tokens, device=self.device, dtype=self.dtype)

        too_large = point_problem(self.preset, point, self.device)
        cells = [Cell(row, point, mode, self.device, too_large) for row in self.rows]
        self.cells += cells
        for cell in cells:
            self.bar.now(f"{mode}, {point}: warm-up of {cell.row.name}")
            if mode == "compile" and time.monotonic() > self.until:
                cell.failed = cell.failed or "not compiled, the time budget ended before"
            if not cell.failed:
                warm_up(cell, inputs(cell.row.image_tokens))
            self.bar.step()
        self.result["checks"] += agreements(cells, self.eager.get(point, {}))
        if mode == "eager":
            self.eager[point] = {cell.row.name: cell.output for cell in cells if cell.output is not None}
        self.publish()
        return cells

    def rounds(self, cells: list[Cell], until: float) -> None:
        mode, point, count = cells[0].mode, cells[0].point, cells[0].point.batch * cells[0].point.images
        if not any(cell.run for cell in cells):
            return

        def take(index: int) -> None:
            self.bar.now(f"{mode}, {point}: round {index + 1} of {self.most}")
            take_round(cells, index, lambda: self.process(self.args.image, count), self.args.decode)
            if not self.gpu:  # others use a CPU too, and a ceiling is what it does when they do not
                self.ceilings = self.ceilings.raised(measure_ceilings(self.device, self.dtype))
            self.bar.step()
            self.publish()

        taken = take_rounds(take, fewest=self.fewest, most=self.most, until=until)
        if self.gpu:  # right behind the work: before it, a GPU idles at a clock of its own
            self.result["clocks_mhz"].append(clock_mhz())
        if taken < self.most:
            planned = f"{taken} rounds fitted into the time budget, {self.most} were planned"
            self.note(f"{mode}, {point}: {planned}; --budget SECONDS or --rounds N takes more")
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
