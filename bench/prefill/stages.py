"""The stages of a prefill, timed from outside, on the model as users call it.

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
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from ..meters import Stopwatch

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
Mark = Callable[[str], None]


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
        return patch.object(module, "forward", lambda *args, **kwargs: (mark(name), original(*args, **kwargs))[1])

    def project(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is not projector:
            return forward(self, *args, **kwargs)
        mark("projector")
        result = forward(self, *args, **kwargs)
        mark("insert")
        return result

    with begin("vision", tower), patch.object(type(projector), "forward", project), begin("prefill", language):
        yield


@contextlib.contextmanager
def inserted(model: nn.Module, keep: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Within the block `keep` gets the inputs_embeds of the language model, and None where the next ones are begun."""
    first, second = model.get_input_embeddings(), model.model.language_model
    begin = first.register_forward_pre_hook(lambda *_: keep(None))
    end = second.register_forward_pre_hook(lambda _, args, kwargs: keep(kwargs["inputs_embeds"]), with_kwargs=True)
    try:
        yield
    finally:
        begin.remove()
        end.remove()


def first_token(model: nn.Module, inputs: dict[str, Tensor], mark: Mark = lambda _: None) -> tuple[Any, list[int]]:
    """One prefill as `generate()` does it: all keys and values kept, logits of the last position only, greedy."""
    mark("start")
    output = model(**inputs, logits_to_keep=1, use_cache=True)
    mark("first_token")
    token = output.logits[:, -1].argmax(-1).tolist()
    mark("end")
    return output, token


def cache_bytes(cache: Any) -> int:
    """Bytes of every key and value tensor that a cache of transformers holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)
