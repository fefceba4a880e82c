"""One row at one point in one mode: what it left for the checks, and every raw sample.

eager: as `generate()` calls it; graph: llava_integration.PrefillRunner, for the baseline alike; compile: its defaults.
"""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..meters import MB, Stopwatch, peak_bytes, synchronize
from ..stats import spread_percent
from .models import SKIP, Row
from .presets import Point
from .stages import STAGES, cache_bytes, first_token, inserted, stage_times, watched


class Eager:
    """The model's own forward; every stage is timed."""

    mode = "eager"

    def __init__(self, row: Row, point: Point, device: str) -> None:
        self.row, self.point, self.model, self.device = row, point, row.module, device
        self.failed: str | None = None
        self.warm_up_s: float | None = None
        self.samples: list[dict[str, float | None]] = []
        # Of the first run. features: image tokens as the language model gets them, in their places.
        self.logits: Tensor | None = None
        self.features: Tensor | None = None
        self.kv_bytes = self.peak = 0

    @property
    def ready(self) -> bool:
        return self.logits is not None and self.failed is None

    def warm_up(self, inputs: dict[str, Tensor]) -> None:
        """The first run is watched for memory and for its outputs; two more follow on a GPU."""
        start, self.inputs = time.monotonic(), inputs
        self.logits = self.first_run()
        for _ in range(2 if self.device == "cuda" else 0):
            self.run()
        self.warm_up_s = time.monotonic() - start

    def first_run(self) -> Tensor:
        with inserted(self.model, self.keep):
            (output, _), self.peak = peak_bytes(lambda: first_token(self.model, self.inputs), self.device)
        self.features, self.kv_bytes = self.image_tokens(), cache_bytes(output.past_key_values)
        return output.logits[:, -1]

    def keep(self, embeds: Tensor | None) -> None:
        """The inputs_embeds that the language model got last. Under capture: the graph's own, new after each replay."""
        self.embeds = embeds

    def image_tokens(self) -> Tensor:
        """A copy of the rows that stand where the prompt has image tokens, [image tokens of the batch, D]."""
        return self.embeds[self.inputs["input_ids"] == self.model.config.image_token_id]

    def run(self) -> dict[str, float | None]:
        """One timed prefill."""
        watch = Stopwatch(self.device)
        synchronize(self.device)
        with watched(self.model, watch.mark):
            first_token(self.model, self.inputs, watch.mark)
        return stage_times(watch)

    def release(self) -> None:
        """A captured graph holds its memory, and the next point may need it."""
        self.embeds = self.compiled = self.runner = None

    def as_dict(self) -> dict[str, Any]:
        """The row of prefill.json: medians, and beside them the samples they come from."""
        row, weights, measured = self.row, sum(p.nbytes for p in self.model.parameters()), self.logits is not None
        samples = {name: [sample[name] for sample in self.samples] for name in (*STAGES, "total_ms")}
        times = {name: median(series) if series and None not in series else None for name, series in samples.items()}
        total, projector = times["total_ms"], times["projector_ms"]
        found = {"model": row.model, "projector": row.projector, "mode": self.mode, **self.point._asdict(), **times}
        return found | {
            "image_tokens": self.point.images * row.image_tokens,
            "projector_share": projector / total if total and projector is not None else None,
            "spread_percent": spread_percent(samples["total_ms"]) if self.samples else None,
            "rounds": len(self.samples),
            "peak_mb": (weights + self.peak) / MB if measured else None,
            "weights_mb": weights / MB,
            "kv_mb": self.kv_bytes / MB if measured else None,
            "warm_up_s": self.warm_up_s,
            "failed": self.failed,
            "samples": samples,
        }


class Compiled(Eager):
    """torch.compile around forward. The boundaries would break its graph, so only the total is timed."""

    mode = "compile"

    def first_run(self) -> Tensor:
        torch._dynamo.config.recompile_limit = 64  # rows share forward's code, each with its own specialisation
        self.compiled = torch.compile(self.model.forward, dynamic=False)
        first_token(self.compiled, self.inputs)
        (output, _), self.peak = peak_bytes(lambda: first_token(self.compiled, self.inputs), self.device)
        self.kv_bytes = cache_bytes(output.past_key_values)
        return output.logits[:, -1]

    def run(self) -> dict[str, float | None]:
        watch = Stopwatch(self.device)
        synchronize(self.device)
        first_token(self.compiled, self.inputs, watch.mark)
        return {**dict.fromkeys(STAGES), "total_ms": watch.between("start", "end")}


class Captured(Eager):
    """One CUDA graph. Events that are recorded outside of it are nodes inside: each replay times its own stages."""

    mode = "graph"

    def first_run(self) -> Tensor:
        self.events: dict[str, torch.cuda.Event] = {}
        # A replay allocates nothing: the memory of a captured prefill is what its capture took.
        with inserted(self.model, self.keep), watched(self.model, self._mark):
            _, self.peak = peak_bytes(self._capture, self.device)
        logits = self._call()
        self.features, self.kv_bytes = self.image_tokens(), cache_bytes(self.runner.cache)
        return logits.clone()

    def _capture(self) -> None:
        from llava_integration import PrefillRunner

        # No room for new tokens: the cache columns of all modes then count the same tokens.
        shape, full_tower = self.inputs["input_ids"].shape, self.row.model != SKIP
        self.runner = PrefillRunner(self.model, *shape, max_new_tokens=0, full_tower=full_tower)
        self._call()  # captured by now, whether the runner captures at once or at its first call

    def _mark(self, name: str) -> None:
        self.events[name] = torch.cuda.Event(enable_timing=True, external=True)
        self.events[name].record()

    def _call(self) -> Tensor:
        return self.runner(self.inputs["input_ids"], self.inputs["pixel_values"])

    def run(self) -> dict[str, float | None]:
        watch = Stopwatch(self.device)
        synchronize(self.device)
        watch.mark("start")
        logits = self._call()
        watch.mark("first_token")
        logits.argmax(-1).tolist()
        watch.mark("end")
        watch.marks |= self.events
        return stage_times(watch)


MODES = {cell.mode: cell for cell in (Eager, Captured, Compiled)}
