"""One row at one point in one mode: what it left for the checks, and every raw sample of its stages.

eager: as `generate()` calls it; graph: llava_integration.PrefillRunner, for the baseline alike; compile: its defaults.

    embed | vision | projector | insert | prefill | first token
          ^tower   ^projector  ^its end ^language model  ^logits  ^token id on the host

Where the projector writes into inputs_embeds itself, that is projector time. total: pixel values on the device -> first
token on the host, the sum of them all.

A boundary is a wrapped `forward` of one submodule; of the projector, of its class: a model that sees a hook or a
forward on its projector takes the plain insertion path, and the stopwatch would change what it times.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..meters import MB, Stopwatch, peak_bytes
from ..stats import spread_percent
from .models import SKIP, Row
from .presets import Point

STAGES = ("vision_ms", "projector_ms", "insert_ms", "prefill_ms", "first_token_ms")
# start of each interval -> stage; "start" and "insert" are both embedding and insertion
INTERVALS = {
    "start": "insert_ms",
    "vision": "vision_ms",
    "projector": "projector_ms",
    "insert": "insert_ms",
    "prefill": "prefill_ms",
    "first_token": "first_token_ms",
}
BOUNDARIES = (*INTERVALS, "end")
Mark = Callable[[str, Tensor | None], None]  # a boundary's name, and the inputs_embeds that "prefill" begins with


def stage_times(watch: Stopwatch) -> dict[str, float]:
    """Milliseconds per stage and their sum; ValueError when a boundary was never met."""
    if missing := [name for name in BOUNDARIES if name not in watch.marks]:
        raise ValueError(f"model: the boundaries {missing} were not met; its submodules are not called as expected")
    times = dict.fromkeys(STAGES, 0.0)
    for begin, end in itertools.pairwise(BOUNDARIES):
        times[INTERVALS[begin]] += watch.between(begin, end)
    return {**times, "total_ms": watch.between("start", "end")}


@contextlib.contextmanager
def watched(model: nn.Module, mark: Mark) -> Iterator[None]:
    """Within the block, calls of the model's submodules mark the boundaries."""
    inner = model.model
    tower, projector, language = inner.vision_tower.embeddings, inner.multi_modal_projector, inner.language_model
    forward = type(projector).forward

    def begin(name: str, module: nn.Module) -> Any:
        original = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            mark(name, kwargs.get("inputs_embeds"))
            return original(*args, **kwargs)

        return patch.object(module, "forward", call)

    def project(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not projector:
            return forward(self, *args, **kwargs)
        mark("projector", None)
        result = forward(self, *args, **kwargs)
        mark("insert", None)
        return result

    with begin("vision", tower), patch.object(type(projector), "forward", project), begin("prefill", language):
        yield


def first_token(model: nn.Module, inputs: dict[str, Tensor], mark: Mark = lambda *_: None) -> Any:
    """One prefill as `generate()` does it: all keys and values kept, logits of the last position only, greedy."""
    mark("start", None)
    output = model(**inputs, logits_to_keep=1, use_cache=True)
    mark("first_token", None)
    output.logits[:, -1].argmax(-1).tolist()
    mark("end", None)
    return output


def cache_bytes(cache: Any) -> int:
    """Bytes of every key and value tensor that a cache of transformers holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


class Eager:
    """The model's own forward; every stage is timed."""

    mode = "eager"

    def __init__(self, row: Row, point: Point, device: str) -> None:
        self.row, self.point, self.model, self.device = row, point, row.module, device
        self.failed: str | None = None
        self.samples: list[dict[str, float | None]] = []
        # Of the first run. features: image tokens as the language model gets them, in their places.
        self.logits: Tensor | None = None
        self.features: Tensor | None = None
        self.kv_bytes, self.peak = 0, 0

    @property
    def ready(self) -> bool:
        return self.logits is not None and self.failed is None

    def warm_up(self, inputs: dict[str, Tensor]) -> None:
        """The first run is watched for memory and for its outputs; two more follow on a GPU."""
        self.inputs = inputs
        self.logits = self.first_run()
        for _ in range(2 if self.device == "cuda" else 0):
            self.run()

    def first_run(self) -> Tensor:
        with watched(self.model, self.keep):
            output, self.peak = peak_bytes(lambda: first_token(self.model, self.inputs), self.device)
        self.features, self.kv_bytes = self.image_tokens(), cache_bytes(output.past_key_values)
        return output.logits[:, -1]

    def keep(self, name: str, embeds: Tensor | None) -> None:
        """The inputs_embeds that the language model got last. Under capture: the graph's own, new after each replay."""
        self.embeds = embeds

    def image_tokens(self) -> Tensor:
        """A copy of the rows that stand where the prompt has image tokens, [image tokens of the batch, D]."""
        return self.embeds[self.inputs["input_ids"] == self.model.config.image_token_id]

    def run(self) -> dict[str, float | None]:
        """One timed prefill."""
        watch = Stopwatch(self.device)
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
        output, self.peak = peak_bytes(lambda: first_token(self.compiled, self.inputs), self.device)
        self.kv_bytes = cache_bytes(output.past_key_values)
        return output.logits[:, -1]

    def run(self) -> dict[str, float | None]:
        watch = Stopwatch(self.device)
        first_token(self.compiled, self.inputs, watch.mark)
        return {**dict.fromkeys(STAGES), "total_ms": watch.between("start", "end")}


class Captured(Eager):
    """One CUDA graph. Events that are recorded outside of it are nodes inside: each replay times its own stages."""

    mode = "graph"

    def first_run(self) -> Tensor:
        from llava_integration import PrefillRunner

        def capture() -> None:
            # No room for new tokens: the cache columns of all modes then count the same tokens.
            options = {"max_new_tokens": 0, "full_tower": self.row.model != SKIP}
            self.runner = PrefillRunner(self.model, *self.inputs["input_ids"].shape, **options)
            self._call()

        self.events: dict[str, torch.cuda.Event] = {}
        # A replay allocates nothing: the memory of a captured prefill is what its capture took.
        with watched(self.model, self.keep):
            _, self.peak = peak_bytes(capture, self.device)
        logits = self._call()
        self.features, self.kv_bytes = self.image_tokens(), cache_bytes(self.runner.cache)
        return logits.clone()

    def keep(self, name: str, embeds: Tensor | None) -> None:
        super().keep(name, embeds)
        self.events[name] = torch.cuda.Event(enable_timing=True, external=True)
        self.events[name].record()

    def _call(self) -> Tensor:
        # The mask, all ones, would be read: a wait for the device.
        return self.runner(**{name: value for name, value in self.inputs.items() if name != "attention_mask"})

    def run(self) -> dict[str, float | None]:
        watch = Stopwatch(self.device)
        watch.mark("start")
        logits = self._call()
        watch.mark("first_token")
        logits.argmax(-1).tolist()
        watch.mark("end")
        watch.marks |= self.events
        return stage_times(watch)


MODES = {cell.mode: cell for cell in (Eager, Captured, Compiled)}
