"""What split-K needs beside its operands: room for partial sums, and counters that are zero between launches.

The counters belong to a stream: two streams may run the same tiles at once. They are made once, zero, and every
launch leaves them zero. Two kinds of launch get counters of their own, zeroed on the device: one under CUDA-graph
capture, because a replay may meet an eager launch; and one of a compiled program (`fresh_counters`), because
Inductor's CUDA graphs give it memory of a pool in which nothing may outlive the program.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_state = threading.local()
_counters: dict[tuple[torch.device, int], Tensor] = {}


def partial_sums(tiles: int, splits: int, tile_elements: int, device: torch.device) -> Tensor:
    """fp32 room for every part of every tile; the caching allocator keeps it with the current stream."""
    return torch.empty(tiles * splits * tile_elements, device=device, dtype=torch.float32)


@contextmanager
def fresh_counters() -> Iterator[None]:
    """Launches of this thread get counters that nothing keeps."""
    before = getattr(_state, "fresh", False)
    _state.fresh = True
    try:
        yield
    finally:
        _state.fresh = before


def arrival_counters(tiles: int, device: torch.device) -> Tensor:
    """At least `tiles` int32 zeros that no other stream uses."""
    if device.type != "cuda":
        return torch.zeros(tiles, device=device, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing() or getattr(_state, "fresh", False):
        return torch.zeros(tiles, device=device, dtype=torch.int32)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None or counters.numel() < tiles:
        counters = torch.zeros(max(tiles, 1024), device=device, dtype=torch.int32)
        _counters[key] = counters
    return counters
