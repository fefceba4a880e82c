"""Time of calls on a GPU whose L2 holds none of their operands.

The host queues flush, event, call, event ahead of the device, so that its own time counts for nothing.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_HEAD_START = 400_000  # cycles that the device waits while the host queues a call


class Flush:
    """Evicts L2 by reading a buffer of four times its size: what a write leaves behind would be written back later, at
    the expense of the timed call."""

    def __init__(self, device: str) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
        self.buffer = torch.ones(max(size // 4, 1), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.buffer.sum()


def in_turns(calls: Sequence[Callable[[], Any]], flush: Flush, rounds: int) -> list[list[float]]:
    """Microseconds of each call in every round, L2 flushed before it; each round begins with another call."""
    taken: list[list[float]] = [[] for _ in calls]
    turns = [(first + i) % len(calls) for first in range(rounds) for i in range(len(calls))]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in turns]
    for i, (begin, end) in zip(turns, marks, strict=True):
        torch.cuda._sleep(_HEAD_START)
        flush()
        begin.record()
        calls[i]()
        end.record()
    marks[-1][1].synchronize()  # this stream alone: others may wait for other processes
    for i, (begin, end) in zip(turns, marks, strict=True):
        taken[i].append(1e3 * begin.elapsed_time(end))
    return taken


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, most: int) -> list[float]:
    """Microseconds of each call, of `most` rounds, or of fewer, three at least, where a round takes long."""
    flush, began = Flush(str(device)), time.monotonic()
    in_turns(calls, flush, 1)  # a warm-up, too
    rounds = min(most, max(3, int(0.04 * most / (time.monotonic() - began))))
    return list(map(median, in_turns(calls, flush, rounds)))
