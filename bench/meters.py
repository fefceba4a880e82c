"""Of one call: its time, the peak of the memory it allocates, and how far its result is from another.

Memory on a CPU is the highest running sum of all that torch's allocator reports to the profiler: scratch inside an
operator included; oneDNN's own buffers are not torch's and are not seen.
"""

import itertools
import math
import os
import time
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

MB = 2**20
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes across the progress bar

# A few roundings: both sides round every intermediate once. tf32 (3e-4) exceeds fp32's.
FEATURES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# The same across modes, whose towers may run other kernels: two of attention lie 1.3e-2 apart in bf16 behind 24 layers.
ACROSS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Logits are behind a whole language model, whose every layer amplifies a difference of its inputs.
LOGITS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 4e-2, torch.bfloat16: 2e-1}


class Stopwatch:
    """Named boundaries of one run, which begins on an idle device.

    Of one that is met again, as tile after tile meets the tower, the first counts.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu, self.marks = device.startswith("cuda"), {}
        synchronize(device)

    def mark(self, name: str, _: object = None) -> None:
        if name not in self.marks:
            self.marks[name] = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
            if self.on_gpu:
                self.marks[name].record()

    def between(self, begin: str, end: str) -> float:
        """Milliseconds."""
        first, second = self.marks[begin], self.marks[end]
        if not self.on_gpu:
            return 1e3 * (second - first)
        torch.cuda.synchronize()
        return first.elapsed_time(second)


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Of one call."""
    watch = Stopwatch(device)
    watch.mark("start")
    call()
    watch.mark("end")
    return watch.between("start", "end")


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], Any], device: str) -> tuple[Any, int]:
    """The call's result, and the peak of what it allocated."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    return result, highest_sum([(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"])


def highest_sum(events: list[tuple[float, int]]) -> int:
    """The peak of a running sum over (time, bytes) events; bytes are negative where memory is given back."""
    return max(itertools.accumulate((size for _, size in sorted(events, key=itemgetter(0))), initial=0))


def available_bytes(device: str) -> int:
    """Memory that a run may take now."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    from psutil import virtual_memory

    return virtual_memory().available


def shortage(need: int, device: str) -> str | None:
    """What is needed and free, where the first is more."""
    free = available_bytes(device)
    return f"about {need / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free" if need > free else None


def compare(name: str, ours: Tensor, theirs: Tensor, bounds: dict[torch.dtype, float]) -> dict[str, Any]:
    """A check of prefill.json; different shapes and values that are not finite never agree."""
    bound, same = bounds[theirs.dtype], ours.shape == theirs.shape
    error = relative_error(ours, theirs) if same else math.nan
    name += "" if same else f" (shapes {list(ours.shape)} and {list(theirs.shape)})"
    return {"name": name, "error": error if math.isfinite(error) else None, "bound": bound, "agrees": error <= bound}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-300))
