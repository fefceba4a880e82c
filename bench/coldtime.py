"""Time of one call on a GPU whose L2 holds none of its operands.

    us        the call captured as a CUDA graph; the host queues flush, event, replay, event far ahead of the device
    us_eager  the call as it is: the device is idle when it begins, so launches and gaps between kernels count
    us_host   the host's own time in that call, without waiting for the device

How a captured call is timed, and what the flush is: stf_kernels/tuning/timing.py. On a CPU only the plain clock
remains, with warm caches: us_eager.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from stf_kernels.tuning.timing import Flush, capture, events, replay

from .stats import median, spread_percent

WARM_UP = 3


@dataclass
class Times:
    """Microseconds: medians, and the samples they come from."""

    us: float | None = None
    us_eager: float | None = None
    us_host: float | None = None
    spread_percent: float | None = None
    repeats: int = 0
    not_captured: str | None = None
    samples: list[float] = field(default_factory=list)


def time_call(call: Callable[[], Any], device: str, flush: Flush, *, seconds: float) -> Times:
    """Repeats for about `seconds` in all, 5 to 100 times each way; what cannot be captured says why."""
    if not device.startswith("cuda"):
        return _time_on_host(call, seconds)
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    times = Times(repeats=20)
    try:
        graph = capture(call)
    except RuntimeError as error:
        times.not_captured = f"not captured: {(str(error).splitlines() or [''])[0][:200]}"
    else:
        begin = time.perf_counter()
        replay(graph, flush, 5)
        each = (time.perf_counter() - begin) / 5
        times.repeats = min(100, max(5, int(seconds / 2 / each)))
        times.samples = replay(graph, flush, times.repeats)
        times.us, times.spread_percent = median(times.samples), spread_percent(times.samples)
        del graph
    eager, host = eager_samples(call, flush, max(5, times.repeats // 2))
    times.us_eager, times.us_host = median(eager), median(host)
    return times


def eager_samples(call: Callable[[], Any], flush: Flush, repeats: int) -> tuple[list[float], list[float]]:
    device, host = [], []
    for _ in range(repeats):
        begin, end = events(2)
        flush()
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        call()
        host.append(1e6 * (time.perf_counter() - start))
        end.record()
        torch.cuda.synchronize()
        device.append(1e3 * begin.elapsed_time(end))
    return device, host


def _time_on_host(call: Callable[[], Any], seconds: float) -> Times:
    samples: list[float] = []
    call()
    until = time.perf_counter() + seconds
    while len(samples) < 5 or (time.perf_counter() < until and len(samples) < 100):
        start = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - start))
    return Times(None, median(samples), None, spread_percent(samples), len(samples), samples=samples)
