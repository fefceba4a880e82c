"""Peak memory of one call, above what was allocated before it.

GPU   torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() before the call
CPU   the highest running sum of every allocation and release that torch's CPU allocator reports to the profiler
      (scratch inside an operator included; oneDNN's own buffers are not torch's and are not seen)
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
MB = 2**20


def peak_bytes(call: Callable[[], T], device: str) -> tuple[T, int]:
    """The call's result, and the peak of what it allocated."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.__enter__()
    try:
        result = call()
    finally:
        with _quiet():
            profiler.__exit__(None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return result, highest_sum([(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"])


def highest_sum(events: list[tuple[float, int]]) -> int:
    """The peak of a running sum over (time, bytes) events; bytes are negative where memory is given back."""
    total = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        total += size
        peak = max(peak, total)
    return peak


def weight_bytes(module: nn.Module) -> int:
    """Parameters and buffers, a shared storage counted once."""
    storages = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def available_bytes(device: str) -> int | None:
    """Memory that a run may take now; None where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's C++ side writes its progress to file descriptor 2, across the progress bar."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
