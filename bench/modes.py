"""How a row is run: one object per row and mode with `run()` (one timed prefill) and `output()` (its logits, untimed).

eager    the model called as `generate()` calls it
graph    llava_integration.PrefillRunner: pixel values -> logits as one CUDA graph, for the baseline alike
compile  torch.compile of the model's forward, default settings, static shapes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .memory import peak_bytes
from .models import Inputs, Row
from .stages import ORDER, STAGES, Stopwatch, cache_bytes, first_token, inserted, measure, watched

MODES = ("eager", "graph", "compile")


@dataclass
class Output:
    """What a run leaves for the checks and the memory columns. features: as the language model gets them, in place."""

    logits: Tensor
    features: Tensor | None
    tokens: list[int]
    kv_bytes: int | None
    peak_bytes: int


class Embeds:
    """The inputs_embeds that a language model was given last. Under capture: the graph's own, new after each replay."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.last: Tensor | None = None

    def keep(self, embeds: Tensor | None) -> None:
        self.last = embeds

    def images(self) -> Tensor | None:
        """A copy of the rows that stand where the prompt has image tokens, [image tokens of the batch, D]."""
        if self.last is None:
            return None
        return self.last[self.inputs.input_ids == self.model.config.image_token_id]


@dataclass
class Eager:
    """The model's own forward; every stage is timed."""

    row: Row
    inputs: Inputs
    device: str
    decode_tokens: int = 0

    def output(self) -> Output:
        model = self.row.activate()
        embeds = Embeds(model, self.inputs)
        with inserted(model, embeds.keep):
            (output, tokens), peak = peak_bytes(
                lambda: first_token(model, self.inputs.keywords(), lambda name: None), self.device
            )
        return Output(output.logits[:, -1], embeds.images(), tokens, cache_bytes(output.past_key_values), peak)

    def run(self) -> dict[str, float]:
        return measure(self.row.activate(), self.inputs.keywords(), self.device)

    def run_wall(self) -> dict[str, float]:
        return measure(self.row.activate(), self.inputs.keywords(), self.device, wall=True)

    def decode(self) -> float:
        """Milliseconds per token of greedy decoding behind an untimed prefill."""
        model = self.row.activate()
        output, tokens = first_token(model, self.inputs.keywords(), lambda name: None)
        watch = Stopwatch(self.device, wall=True)
        watch.mark("start")
        for _ in range(self.decode_tokens):
            ids = torch.tensor(tokens, device=self.inputs.input_ids.device)[:, None]
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1].argmax(-1).tolist()
        watch.mark("end")
        return 1e3 * (watch.marks["end"] - watch.marks["start"]) / self.decode_tokens


@dataclass
class Compiled(Eager):
    """torch.compile around forward. The boundaries would break its graph, so only the total is timed."""

    compiled: Any = field(default=None, init=False)

    def _call(self) -> Any:
        model = self.row.activate()
        if self.compiled is None:
            torch._dynamo.config.recompile_limit = 64  # rows share forward's code, each with its own specialisation
            self.compiled = torch.compile(model.forward, dynamic=False)
        return self.compiled(**self.inputs.keywords(), logits_to_keep=1, use_cache=True)

    def output(self) -> Output:
        self._call()
        output, peak = peak_bytes(self._call, self.device)
        logits = output.logits[:, -1]
        return Output(logits, None, logits.argmax(-1).tolist(), cache_bytes(output.past_key_values), peak)

    def run(self) -> dict[str, float]:
        return time_total(lambda: self._call().logits[:, -1], self.device)

    def run_wall(self) -> None:
        return None


class Captured:
    """One CUDA graph. Events that are recorded outside of it are nodes inside: each replay times its own stages."""

    def __init__(self, row: Row, inputs: Inputs, device: str) -> None:
        from llava_integration import PrefillRunner

        if not device.startswith("cuda"):
            raise ValueError("modes: 'graph' needs a GPU")
        self.row, self.inputs, self.device = row, inputs, device
        self.events: dict[str, torch.cuda.Event] = {}
        model = row.activate()
        self.embeds = Embeds(model, inputs)

        def capture() -> None:
            # Rows keep the tower layer that they run for nothing, except those whose saving it is to skip it.
            # No room for new tokens: the cache columns of all modes then count the same tokens.
            self.runner = PrefillRunner(model, *inputs.input_ids.shape, max_new_tokens=0, full_tower=row.full_tower)
            self._call()  # captured by now, whether the runner captures at once or at its first call

        # A replay allocates nothing: the memory of a captured prefill is what its capture took.
        try:
            with watched(model, self._mark), inserted(model, self.embeds.keep):
                _, self.peak = peak_bytes(capture, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a driver that cannot record events inside a graph: the total is worth having alone
            self.events.clear()
            with inserted(model, self.embeds.keep):
                _, self.peak = peak_bytes(capture, device)

    def _mark(self, name: str) -> None:
        event = self.events[name] = torch.cuda.Event(enable_timing=True, external=True)
        event.record()

    def _call(self) -> Tensor:
        return self.runner(self.inputs.input_ids, self.inputs.pixel_values)

    def output(self) -> Output:
        logits = self._call()
        tokens, features = logits.argmax(-1).tolist(), self.embeds.images()
        return Output(logits.clone(), features, tokens, cache_bytes(self.runner.cache), self.peak)

    def run(self) -> dict[str, float | None]:
        result: dict[str, float | None] = dict.fromkeys(STAGES)
        torch.cuda.synchronize()
        begin, logits_done, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        begin.record()
        logits = self._call()
        logits_done.record()
        logits.argmax(-1).tolist()
        end.record()
        torch.cuda.synchronize()
        result["total_ms"] = begin.elapsed_time(end)
        inside = [self.events[name] for name in ORDER if name in self.events]
        try:
            if len(inside) == 4:  # vision, projector, insert, prefill
                vision, projector, insert, prefill = inside
                result |= {
                    "vision_ms": vision.elapsed_time(projector),
                    "projector_ms": projector.elapsed_time(insert),
                    "insert_ms": begin.elapsed_time(vision) + insert.elapsed_time(prefill),
                    "prefill_ms": prefill.elapsed_time(logits_done),
                    "first_token_ms": logits_done.elapsed_time(end),
                }
        except RuntimeError:  # the driver or the runner does not time events inside a graph: the total stands alone
            pass
        return result

    def run_wall(self) -> dict[str, float | None]:
        """A host has no boundaries inside a graph."""
        return time_total(self._call, self.device)


def time_total(call: Any, device: str) -> dict[str, float | None]:
    """The total of a run whose inside cannot be watched, token id on the host included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    watch = Stopwatch(device, wall=True)
    watch.mark("start")
    call().argmax(-1).tolist()
    watch.mark("end")
    return {**dict.fromkeys(STAGES), "total_ms": 1e3 * (watch.marks["end"] - watch.marks["start"])}


def prepare(mode: str, row: Row, inputs: Inputs, device: str, decode_tokens: int) -> Any:
    if mode == "eager":
        return Eager(row, inputs, device, decode_tokens)
    if mode == "compile":
        return Compiled(row, inputs, device)
    return Captured(row, inputs, device)
