"""What split-K needs beside its operands: room for partial sums, and counters that are zero between launches.

The counters belong to a stream: two streams may run the same tiles at once. They are made once, zero, and every
launch leaves them zero. Under CUDA-graph capture a launch gets counters of its own, zeroed by a node of the graph,
because a replay may meet an eager launch.
"""

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def partial_sums(tiles: int, splits: int, tile_elements: int, device: torch.device) -> Tensor:
    """fp32 room for every part of every tile; the caching allocator keeps it with the current stream."""
    return torch.empty(tiles * splits * tile_elements, device=device, dtype=torch.float32)


def arrival_counters(tiles: int, device: torch.device) -> Tensor:
    """At least `tiles` int32 zeros that no other stream uses."""
    if device.type != "cuda":
        return torch.zeros(tiles, device=device, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, device=device, dtype=torch.int32)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None or counters.numel() < tiles:
        counters = torch.zeros(max(tiles, 1024), device=device, dtype=torch.int32)
        _counters[key] = counters
    return counters
