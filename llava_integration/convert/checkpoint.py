"""A checkpoint as a dict of names to `Entry`: shape and dtype at once, values only when read, one tensor at a time.

Renaming, overlaying and merging checkpoints are then operations on dicts. `.safetensors` files are mapped;
`.bin` files are mapped too, and read with weights_only=True, which executes no code that a pickle may carry.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError

# In the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint that has not been read yet; `how` says what its reading does besides."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: not a floating dtype
    read: Callable[[], Tensor]
    origin: str
    how: str = "mapped"


Entries = dict[str, Entry]


def weights_file(folder: Path) -> Path | None:
    """The file that holds, or indexes, the weights of `folder`; None where there is none."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def open_weights(folder: Path, what: str = "SRC") -> Entries:
    """All tensors of a checkpoint folder, sharded or not."""
    file = weights_file(folder)
    if file is None:
        raise ConversionError(f"{what}: expected one of {', '.join(WEIGHT_FILES)} in {folder}, found none of them")
    if not file.name.endswith(".index.json"):
        return open_file(file)

    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ConversionError(f"{file}: expected a weight_map of tensor names to files; get the file again")
    entries: Entries = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ConversionError(f"{file}: names {shard}, which is not in the folder; complete the checkpoint")
        entries |= open_file(folder / shard)
    if missing := sorted(weight_map.keys() - entries.keys()):
        raise ConversionError(
            f"{file}: names {len(missing)} tensors that its files do not hold, first {missing[0]}; "
            "complete the checkpoint"
        )
    return entries


def open_file(path: Path) -> Entries:
    """All tensors of one `.safetensors` or `.bin` file."""
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: expected JSON, got {error}; get the file again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _open_safetensors(path: Path) -> Entries:
    _refuse_pointer(path)
    try:
        handle = safe_open(path, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path}: truncated or not safetensors ({error}); get the file again") from error
    return {
        name: Entry(
            tuple(view.get_shape()),
            SAFETENSORS_DTYPES.get(view.get_dtype()),
            lambda name=name: handle.get_tensor(name),
            path.name,
        )
        for name, view in slices.items()
    }


def _open_torch(path: Path) -> Entries:
    _refuse_pointer(path)
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: expected tensors only, got a pickle with other objects or code in it, which was not executed; "
            "get the weights as safetensors or from a source you trust"
        ) from error
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise ConversionError(f"{path}: truncated or not a torch checkpoint; get the file again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"{path}: expected a dict of tensors, got {_describe(content)}")
    return {
        str(name): Entry(
            tuple(tensor.shape),
            tensor.dtype if tensor.is_floating_point() else None,
            lambda tensor=tensor: tensor.detach(),
            path.name,
        )
        for name, tensor in content.items()
    }


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6: cannot be mapped


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return "a dict with " + ", ".join(sorted({type(value).__name__ for value in content.values()}))


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path}: expected weights, got a git-lfs pointer; run git lfs pull in its folder")
