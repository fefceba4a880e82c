"""The stages of a prefill, timed from outside, on the model as users call it.

    embed | vision | projector | insert | prefill | first token
          ^tower   ^projector  ^its end ^language model  ^logits  ^token id on the host

A boundary is a wrapped `forward` of one submodule; of the projector, of its class. Hooks would do for the stock model,
but an STF model that sees a hook or a forward on its projector takes the plain insertion path: a stopwatch that changes
what it times.

    vision_ms      tower -> projector           (with the selection of hidden states)
    projector_ms   the projector's call         (where it writes into inputs_embeds itself, that is part of it)
    insert_ms      start -> tower, and the projector's end -> language model: embedding and insertion
    prefill_ms     language model and head, up to the logits
    first_token_ms argmax, and the id on the host
    total_ms       the sum: pixel values on the device -> first token on the host

On a GPU the boundaries are device events and nothing waits between them; `wall=True` waits at each boundary and takes
the host's clock, which is what a stage costs alone. On a CPU both are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

STAGES = ("vision_ms", "projector_ms", "insert_ms", "prefill_ms", "first_token_ms")
# start of each interval -> stage; "start" and "insert" are both embedding and insertion
_INTERVALS = {
    "start": "insert_ms",
    "vision": "vision_ms",
    "projector": "projector_ms",
    "insert": "insert_ms",
    "prefill": "prefill_ms",
    "first_token": "first_token_ms",
}
ORDER = (*_INTERVALS, "end")


class Stopwatch:
    """Boundaries of one run: device events on a GPU, the host's clock elsewhere or with `wall`."""

    def __init__(self, device: str, *, wall: bool = False) -> None:
        self.events, self.wall = device.startswith("cuda"), wall
        self.marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        if self.events and not self.wall:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks[name] = event
            return
        if self.events:
            torch.cuda.synchronize()
        self.marks[name] = time.perf_counter()

    def stages(self) -> dict[str, float]:
        """Milliseconds per stage and their sum; ValueError when a boundary was never met."""
        missing = [name for name in ORDER if name not in self.marks]
        if missing:
            raise ValueError(f"model: the boundaries {missing} were not met; its submodules are not called as expected")
        if self.events:
            torch.cuda.synchronize()
        result = dict.fromkeys(STAGES, 0.0)
        for begin, end in itertools.pairwise(ORDER):
            result[_INTERVALS[begin]] += self.between(begin, end)
        return {**result, "total_ms": self.between("start", "end")}

    def between(self, begin: str, end: str) -> float:
        first, second = self.marks[begin], self.marks[end]
        if isinstance(first, float):
            return 1e3 * (second - first)
        return first.elapsed_time(second)


@contextlib.contextmanager
def watched(model: nn.Module, mark: Callable[[str], None]) -> Iterator[None]:
    """Within the block, calls of the model's submodules mark the boundaries."""
    inner = model.model
    with contextlib.ExitStack() as stack:
        stack.enter_context(_on_instance(vision_entry(inner.vision_tower), mark, "vision"))
        stack.enter_context(_on_class(inner.multi_modal_projector, mark, "projector", "insert"))
        stack.enter_context(_on_instance(inner.language_model, mark, "prefill"))
        yield


@contextlib.contextmanager
def inserted(model: nn.Module, keep: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Within the block `keep` gets the inputs_embeds of the language model, and None where the next ones are begun."""
    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: keep(None)),
        model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: keep(kwargs["inputs_embeds"]), with_kwargs=True
        ),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def vision_entry(tower: nn.Module) -> nn.Module:
    """The tower's embeddings: the first thing that both the stock forward and a shortened loop call."""
    for name, module in tower.named_modules():
        if name.rsplit(".", 1)[-1] == "embeddings":
            return module
    raise ValueError(f"vision_tower: expected a tower with an `embeddings` module, got {type(tower).__name__}")


@contextlib.contextmanager
def _on_instance(module: nn.Module, mark: Callable[[str], None], before: str) -> Iterator[None]:
    """`module` marks where it begins. Its class stays as it is: transformers looks its models up by class."""
    own, original = vars(module).get("forward"), module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        mark(before)
        return original(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextlib.contextmanager
def _on_class(module: nn.Module, mark: Callable[[str], None], before: str, after: str) -> Iterator[None]:
    """`module` marks where it begins and ends, and carries no trace of it: its class does, for as long as the block."""
    cls = type(module)
    own, original = vars(cls).get("forward"), cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return original(self, *args, **kwargs)
        mark(before)
        result = original(self, *args, **kwargs)
        mark(after)
        return result

    cls.forward = forward
    try:
        yield
    finally:
        if own is None:
            del cls.forward
        else:
            cls.forward = own


def first_token(model: nn.Module, inputs: dict[str, Tensor], mark: Callable[[str], None]) -> tuple[Any, list[int]]:
    """One prefill as `generate()` does it: all keys and values kept, logits of the last position only, greedy."""
    mark("start")
    output = model(**inputs, logits_to_keep=1, use_cache=True)
    mark("first_token")
    token = output.logits[:, -1].argmax(-1).tolist()
    mark("end")
    return output, token


def measure(model: nn.Module, inputs: dict[str, Tensor], device: str, *, wall: bool = False) -> dict[str, float]:
    """One timed prefill. The device is idle when the clock starts."""
    watch = Stopwatch(device, wall=wall)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    with watched(model, watch.mark):
        first_token(model, inputs, watch.mark)
    return watch.stages()


def cache_bytes(cache: Any) -> int:
    """Bytes of every key and value tensor that a cache of transformers holds."""
    layers = getattr(cache, "layers", [])
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if isinstance(tensor, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
