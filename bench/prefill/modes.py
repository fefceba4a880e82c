"""How a row is run: one object per row and mode with `run()` (one timed prefill) and `output()` (its logits, untimed).

eager    the model called as `generate()` calls it
graph    llava_integration.PrefillRunner: pixel values -> logits as one CUDA graph, for the baseline alike
compile  torch.compile of the model's forward, default settings, static shapes
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..meters import Stopwatch, peak_bytes, synchronize
from .models import SKIP, Row
from .stages import STAGES, cache_bytes, first_token, inserted, measure, stage_times, watched


@dataclass
class Output:
    """What a run leaves for the checks and the memory columns. features: as the language model gets them, in place."""

    logits: Tensor
    features: Tensor | None
    tokens: list[int]
    kv_bytes: int
    peak_bytes: int


class Eager:
    """The model's own forward; every stage is timed."""

    def __init__(self, row: Row, inputs: dict[str, Tensor], device: str) -> None:
        self.row, self.model, self.device = row, row.module, device
        self.inputs = inputs
        self.embeds: Tensor | None = None

    def keep(self, embeds: Tensor | None) -> None:
        """The inputs_embeds that the language model got last. Under capture: the graph's own, new after each replay."""
        self.embeds = embeds

    def features(self) -> Tensor | None:
        """A copy of the rows that stand where the prompt has image tokens, [image tokens of the batch, D]."""
        return self.embeds[self.inputs["input_ids"] == self.model.config.image_token_id]

    def output(self) -> Output:
        with inserted(self.model, self.keep):
            (output, tokens), peak = peak_bytes(lambda: first_token(self.model, self.inputs), self.device)
        found = Output(output.logits[:, -1], self.features(), tokens, cache_bytes(output.past_key_values), peak)
        self.embeds = None
        return found

    def run(self) -> dict[str, float | None]:
        return measure(self.model, self.inputs, self.device)


class Compiled(Eager):
    """torch.compile around forward. The boundaries would break its graph, so only the total is timed."""

    def __init__(self, row: Row, inputs: dict[str, Tensor], device: str) -> None:
        super().__init__(row, inputs, device)
        torch._dynamo.config.recompile_limit = 64  # rows share forward's code, each with its own specialisation
        self.compiled = torch.compile(self.model.forward, dynamic=False)

    def output(self) -> Output:
        first_token(self.compiled, self.inputs)
        (output, tokens), peak = peak_bytes(lambda: first_token(self.compiled, self.inputs), self.device)
        return Output(output.logits[:, -1], None, tokens, cache_bytes(output.past_key_values), peak)

    def run(self) -> dict[str, float | None]:
        watch = Stopwatch(self.device)
        synchronize(self.device)
        first_token(self.compiled, self.inputs, watch.mark)
        return {**dict.fromkeys(STAGES), "total_ms": watch.between("start", "end")}


class Captured(Eager):
    """One CUDA graph. Events that are recorded outside of it are nodes inside: each replay times its own stages."""

    def __init__(self, row: Row, inputs: dict[str, Tensor], device: str) -> None:
        super().__init__(row, inputs, device)
        self.events: dict[str, torch.cuda.Event] = {}
        # A replay allocates nothing: the memory of a captured prefill is what its capture took.
        with inserted(self.model, self.keep):
            try:
                with watched(self.model, self._mark):
                    _, self.peak = peak_bytes(self._capture, device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a driver that cannot record events inside a graph: the total is worth having alone
                self.events.clear()
                _, self.peak = peak_bytes(self._capture, device)

    def _capture(self) -> None:
        from llava_integration import PrefillRunner

        # Rows keep the tower layer that they run for nothing, except the one whose saving it is to skip it.
        # No room for new tokens: the cache columns of all modes then count the same tokens.
        shape, full_tower = self.inputs["input_ids"].shape, self.row.model != SKIP
        self.runner = PrefillRunner(self.model, *shape, max_new_tokens=0, full_tower=full_tower)
        self._call()  # captured by now, whether the runner captures at once or at its first call

    def _mark(self, name: str) -> None:
        self.events[name] = torch.cuda.Event(enable_timing=True, external=True)
        self.events[name].record()

    def _call(self) -> Tensor:
        return self.runner(self.inputs["input_ids"], self.inputs["pixel_values"])

    def output(self) -> Output:
        logits = self._call()
        tokens, kv = logits.argmax(-1).tolist(), cache_bytes(self.runner.cache)
        return Output(logits.clone(), self.features(), tokens, kv, self.peak)

    def run(self) -> dict[str, float | None]:
        watch = Stopwatch(self.device)
        synchronize(self.device)
        watch.mark("start")
        logits = self._call()
        watch.mark("first_token")
        logits.argmax(-1).tolist()
        watch.mark("end")
        watch.marks |= self.events
        try:
            return stage_times(watch)
        except (ValueError, RuntimeError):  # no events inside the graph, or a driver that does not time them
            return {**dict.fromkeys(STAGES), "total_ms": watch.between("start", "end")}


MODES = {"eager": Eager, "graph": Captured, "compile": Compiled}
