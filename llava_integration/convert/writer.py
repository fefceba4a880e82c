"""Safetensors shards written tensor by tensor: the header is known from the plan, so no shard is ever held in memory.

file = u64 length of the header | JSON header {name: {dtype, shape, data_offsets}} | tensors, little-endian
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import ConversionError

MAX_SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX_FILE = "model.safetensors.index.json"
ALIGNMENT = 8


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name and shape now, its values when `read` is called."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def write_shards(
    folder: Path,
    outputs: Sequence[Output],
    dtype: torch.dtype,
    max_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], object] = lambda count: None,
) -> int:
    """Write `outputs` as `dtype` into files of at most `max_bytes` (more only for a tensor that alone is larger).

    `advance` is called with the bytes of every tensor written. Returns the bytes of all tensors.
    """
    shards = split(outputs, dtype, max_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, dtype, advance)
    total = sum(output.numel for output in outputs) * dtype.itemsize
    if len(shards) > 1:
        weight_map = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def split(outputs: Sequence[Output], dtype: torch.dtype, max_bytes: int) -> list[list[Output]]:
    """`outputs` in order, cut so that every file, header included, stays within `max_bytes`."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        # The header's share of one tensor: name, numbers and punctuation.
        added = output.numel * dtype.itemsize + len(output.name.encode()) + 160
        if shards[-1] and size + added + 160 > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += added
    return shards


def _write_shard(path: Path, shard: Sequence[Output], dtype: torch.dtype, advance: Callable[[int], object]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in shard:
        start, end = end, end + output.numel * dtype.itemsize
        header[output.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(output.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("wb") as file:
        write(file, struct.pack("<Q", len(encoded)) + encoded)
        for output in shard:
            tensor = _cast(output, dtype)
            write(file, tensor.reshape(-1).view(torch.uint8).numpy())
            advance(tensor.numel() * dtype.itemsize)


def write(file: BinaryIO, data: object) -> None:
    """The one place where bytes of weights reach the disk."""
    file.write(data)


def _cast(output: Output, dtype: torch.dtype) -> Tensor:
    tensor = output.read()
    if tuple(tensor.shape) != output.shape:
        raise ConversionError(f"{output.name}: expected shape {output.shape}, got {tuple(tensor.shape)}")
    cast = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and tensor.dtype != dtype and not cast.isfinite().all() and tensor.isfinite().all():
        raise ConversionError(
            f"--dtype: {output.name} has values up to {tensor.abs().max().item():.3g}, which float16 cannot hold; "
            "use bfloat16 or float32"
        )
    return cast
