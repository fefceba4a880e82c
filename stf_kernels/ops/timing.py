"""Time of a call on a GPU whose L2 holds none of its operands: captured (replay), or as it is (in_turns).

The host queues flush, event, call, event ahead of the device, so that its own time counts for nothing.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_HEAD_START = 400_000  # cycles that the device waits while the host queues a call


class Flush:
    """Evicts L2 by reading a buffer of four times its size: what a write leaves behind would be written back later, at
    the expense of the timed call."""

    def __init__(self, device: str) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
        self.buffer = torch.ones(max(size // 4, 1), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.buffer.sum()


def capture(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """The kernels of one call, as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def replay(graph: torch.cuda.CUDAGraph, flush: Flush, repeats: int) -> list[float]:
    """Microseconds of each replay, L2 flushed before it."""
    begins, ends = events(repeats), events(repeats)
    for begin, end in zip(begins, ends, strict=True):
        flush()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]


def in_turns(calls: Sequence[Callable[[], Any]], device: torch.device, most: int) -> list[list[float]]:
    """Microseconds of each call in 3 to `most` rounds, fewer of long ones; every round begins with another call."""
    flush, indices = Flush(str(device)), range(len(calls))

    def take(first: int) -> list[float]:
        begins, ends = events(len(calls)), events(len(calls))
        for i in [*indices[first:], *indices[:first]]:
            torch.cuda._sleep(_HEAD_START)
            flush()
            begins[i].record()
            calls[i]()
            ends[i].record()
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]

    began = time.monotonic()
    take(0)  # a warm-up, which says how long a round takes
    rounds = min(most, max(3, int(0.04 * most / (time.monotonic() - began))))
    return list(map(list, zip(*(take(turn % len(calls)) for turn in range(rounds)), strict=True)))
