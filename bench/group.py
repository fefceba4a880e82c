"""One group of the prefill table: the same batch, text length and mode for every row, measured in interleaved rounds.

Round i runs every row once, starting with another row each time, so drift of clocks or of a busy machine meets all rows
alike, and a speed-up is a ratio of neighbours in time.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import agreement
from .memory import MB, weight_bytes
from .models import Inputs, Row
from .modes import Output, prepare
from .speedup import point
from .stages import STAGES
from .stats import median, spread_percent

# row -> the row whose outputs it must repeat
TWINS = {
    "llava-stf/fused": "llava-stf/reference",
    "llava-stf/fused+savings": "llava-stf/fused",
    "llava-1.5-skip/mlp2x": "llava-1.5/mlp2x",
}
_BROKEN = "does not work here"
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass
class Cell:
    """One row of one group, with every raw sample."""

    row: Row
    batch: int
    text_tokens: int
    images: int
    mode: str
    weights: int
    device: str
    output: Output | None = None
    samples: list[dict[str, float | None]] = field(default_factory=list)
    wall_samples: list[dict[str, float]] = field(default_factory=list)
    preprocess: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    failed: str | None = None
    warm_up_s: float | None = None

    def series(self, stage: str) -> list[float]:
        values = [sample[stage] for sample in self.samples]
        return [] if any(value is None for value in values) else values  # type: ignore[return-value]

    def as_dict(self) -> dict[str, Any]:
        """The row of prefill.json: medians under DESIGN's names, the samples behind them beside."""
        result: dict[str, Any] = {
            "model": self.row.model, "projector": self.row.projector, "batch": self.batch,
            "image_tokens": self.images * self.row.image_tokens, "text_tokens": self.text_tokens,
            "images": self.images, "mode": self.mode, "savings": self.row.savings(self.mode, self.device),
        }  # fmt: skip
        for stage in (*STAGES, "total_ms"):
            series = self.series(stage)
            result[stage] = median(series) if series else None
        total, projector = result["total_ms"], result["projector_ms"]
        staged = total and projector is not None
        output = self.output
        result |= {
            "preprocess_ms": median(self.preprocess) if self.preprocess else None,
            "end_to_end_ms": total + median(self.preprocess) if total and self.preprocess else None,
            "decode_ms_per_token": median(self.decode) if self.decode else None,
            "projector_share": projector / total if staged else None,
            "shares": {stage: result[stage] / total if staged else None for stage in STAGES},
            "spread_percent": spread_percent(self.series("total_ms")) if self.samples else None,
            "rounds": len(self.samples),
            "peak_mb": (self.weights + output.peak_bytes) / MB if output else None,
            "weights_mb": self.weights / MB,
            "activations_mb": output.peak_bytes / MB if output else None,
            "kv_mb": output.kv_bytes / MB if output and output.kv_bytes is not None else None,
            "first_tokens": output.tokens if output else None,
            "warm_up_s": self.warm_up_s,
            "failed": self.failed,
            "samples": {stage: [s[stage] for s in self.samples] for stage in (*STAGES, "total_ms")},
            "wall_samples": {stage: [s[stage] for s in self.wall_samples] for stage in (*STAGES, "total_ms")},
            "preprocess_samples": self.preprocess,
            "decode_samples": self.decode,
        }
        return result


def is_broken(row: dict[str, Any]) -> bool:
    """Whether a row of a result ended in an error that it should not. torch.compile is a mode where it works."""
    return row["mode"] != "compile" and _BROKEN in (row["failed"] or "")


class Group:
    """Warm up and check every row, then take rounds."""

    def __init__(
        self, rows: list[Row], *, batch: int, text_tokens: int, images: int = 1, mode: str, device: str, warmup: int,
        inputs: Callable[[Row], Inputs], preprocess: Callable[[], float], decode_tokens: int = 0,
        too_large: str | None = None,
    ) -> None:  # fmt: skip
        self.device, self.warmup, self.preprocess, self.decode_tokens = device, warmup, preprocess, decode_tokens
        self.inputs, self.mode = inputs, mode
        self.cells = [Cell(row, batch, text_tokens, images, mode, weight_bytes(row.activate()), device) for row in rows]
        for cell in self.cells:
            cell.failed = too_large
        self.runs: dict[str, Any] = {}
        self.checks: list[agreement.Check] = []

    def warm_up(self, cell: Cell) -> None:
        """The first run is watched for memory and for its outputs; more follow on a GPU."""
        if cell.failed:
            return
        start = time.monotonic()
        try:
            run = self.runs[cell.row.name] = prepare(
                self.mode, cell.row, self.inputs(cell.row), self.device, self.decode_tokens
            )
            cell.output = run.output()
            for _ in range(self.warmup):
                run.run()
            cell.warm_up_s = time.monotonic() - start
        except _OUT_OF_MEMORY as error:
            self._give_up(cell, f"does not fit into memory ({_first_line(error)})")
        except Exception as error:  # a defect of one row must not cost the others'
            traceback.print_exc()
            self._give_up(cell, f"{self.mode} {_BROKEN} ({type(error).__name__}: {_first_line(error)})")

    def _give_up(self, cell: Cell, why: str) -> None:
        cell.failed = why
        self.runs.pop(cell.row.name, None)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def check(self, eager: dict[str, Output]) -> list[agreement.Check]:
        """Twins against each other; in other modes also each row against its own eager outputs."""
        outputs = {cell.row.name: cell.output for cell in self.cells if cell.output is not None}
        where = f"{point(self.cells[0].as_dict())}, {self.mode}"
        for name, other in TWINS.items():
            ours, theirs = outputs.get(name), outputs.get(other)
            if ours is None or theirs is None:
                continue
            pair = f"{name} against {other}, {where}"
            if ours.features is not None and theirs.features is not None:
                self.checks.append(
                    agreement.compare(f"image features, {pair}", ours.features, theirs.features, agreement.FEATURES)
                )
            self.checks.append(agreement.compare(f"logits, {pair}", ours.logits, theirs.logits, agreement.LOGITS))
        for name, output in outputs.items():
            if self.mode == "eager" or name not in eager:
                continue
            title = f"{name} against its eager run, {where}"
            if output.features is not None and eager[name].features is not None:
                features = output.features, eager[name].features
                self.checks.append(agreement.compare(f"image features, {title}", *features, agreement.ACROSS))
            self.checks.append(
                agreement.compare(f"logits, {title}", output.logits, eager[name].logits, agreement.LOGITS)
            )
        return self.checks

    def round(self, index: int) -> None:
        """Every row once, in an order that rotates."""
        cells = [cell for cell in self.cells if cell.row.name in self.runs]
        shift = index % max(len(cells), 1)
        for cell in cells[shift:] + cells[:shift]:
            run = self.runs[cell.row.name]
            cell.preprocess.append(self.preprocess())
            cell.samples.append(run.run())
            if self.device.startswith("cuda") and (wall := run.run_wall()):
                cell.wall_samples.append(wall)
            if self.decode_tokens and self.mode == "eager":
                cell.decode.append(run.decode())

    def release(self) -> None:
        """A captured graph holds its memory, and the next point may need it."""
        self.runs.clear()
        if self.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def measurable(self) -> bool:
        return bool(self.runs)


def take_rounds(
    group: Group, *, fewest: int, most: int, until: float, after_each: Callable[[], None] = lambda: None
) -> int:
    """At least `fewest` rounds, at most `most`, none begun that would end after `until`; how many there were."""
    taken, longest = 0, 0.0
    while group.measurable and taken < most:
        start = time.monotonic()
        if taken >= fewest and start + longest > until:
            break
        group.round(taken)
        longest = max(longest, time.monotonic() - start)
        taken += 1
        after_each()
    return taken


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160]
