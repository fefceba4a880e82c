"""A checkpoint as a dict of names to `Entry`: shape and dtype at once, values only when read, one tensor at a time.

Renaming, overlaying and merging checkpoints are then operations on dicts. Files are mapped, and `.bin` files read with
weights_only=True, which executes no code that a pickle may carry.
"""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from .report import ConversionError, Report

# In the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that a folder is written in
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
# What older checkpoints stored and the model computes or ties: the only tensors that may be left over.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$|^lm_head\.weight$")
SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """One tensor, not read yet: its name and file in the checkpoint, and what happened to it on the way here."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    origin: str
    how: str = "mapped"

    def then(self, how: str, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "Entry":
        """`change` of it, when it is read."""
        return replace(self, read=lambda: change(self.read()), how=how, shape=shape or self.shape)


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
        raise ConversionError(f"{file}: names {missing[0]}, which no file holds; complete the checkpoint")
    return entries


def open_file(path: Path) -> Entries:
    """All tensors of one `.safetensors` or `.bin` file."""
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path}: expected weights, got a git-lfs pointer; run git lfs pull in its folder")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        got = "a pickle with other objects or code in it, which was not executed"
        raise ConversionError(f"{path}: expected tensors only, got {got}; get the weights as safetensors") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise ConversionError(f"{path}: truncated or not a file of weights; get the file again") from error
    values = content.values() if isinstance(content, dict) else [content]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in values):
        got = ", ".join(sorted({type(value).__name__ for value in values}))
        raise ConversionError(f"{path}: expected a dict of tensors, got {got}")
    return {
        str(name): Entry(str(name), tuple(tensor.shape), tensor.dtype, tensor.detach, path.name)
        for name, tensor in content.items()
    }


def read_json(path: Path, missing_ok: bool = False) -> dict:
    """The object in a JSON file; {} without the file where that may be."""
    if missing_ok and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: expected JSON, got {error}; get the file again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def rename(entries: Entries, name_of: Callable[[str], str | None]) -> Entries:
    """Entries under the model's names; those without one stay under their own."""
    renamed: Entries = {}
    for name, entry in entries.items():
        target = name_of(name) or name
        if target in renamed:
            other = renamed[target].name
            raise ConversionError(f"SRC: {name} and {other} are both {target}; remove one from the checkpoint")
        renamed[target] = entry
    return renamed


def settle_head(entries: Entries, tied: bool, report: Report) -> bool:
    """Whether the model is tied that config.json calls `tied`: as in transformers, what the checkpoint holds decides.

    embeddings alone, or both and equal    tied
    head alone                             tied, and the head is the embeddings: safetensors keeps the first name
    both and different                     two tensors, whatever config.json says
    """
    if not tied or HEAD not in entries:
        return tied
    if EMBEDDINGS not in entries:
        entries[EMBEDDINGS] = entries.pop(HEAD)
        return True
    head, embeddings = entries[HEAD], entries[EMBEDDINGS]
    if head.shape == embeddings.shape and torch.equal(head.read(), embeddings.read().to(head.dtype)):
        return True
    report.notes.append("config.json ties the head to the embeddings, but both are there and differ: kept apart")
    return False


def match(model: PreTrainedModel, entries: Entries, report: Report) -> Entries:
    """One entry of the right shape for every tensor of `model`; nothing but what it computes may be left over."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    missing = [name for name in wanted if name not in entries]
    left = [name for name in entries if name not in wanted]
    foreign = [entries[name].name for name in left if not COMPUTED.search(name)]
    kinds = {"missing": missing, "left over": foreign}
    got = [f"{len(names)} tensors are {kind}: {', '.join(names[:SHOWN])}" for kind, names in kinds.items() if names]
    if got:
        expected = f"expected exactly the {len(wanted)} of the model that config.json describes"
        raise ConversionError(f"SRC: {'; '.join(got)}; {expected}: complete the checkpoint, or it is of another kind")
    for name, shape in wanted.items():
        entry = entries[name]
        where = f"SRC: {entry.name} in {entry.origin}: expected"
        if entry.shape != shape:
            raise ConversionError(f"{where} shape {list(shape)} by the configuration, got {list(entry.shape)}")
        if entry.dtype not in (*DTYPES, torch.float64):
            raise ConversionError(f"{where} float32, float16 or bfloat16, got {entry.dtype}; take one not quantized")
        report.tensors[entry.how].append(f"{name} <- {entry.name}")
    report.tensors["left over"] += [f"{entries[name].name}: computed by the model" for name in left]
    return {name: entries[name] for name in wanted}
