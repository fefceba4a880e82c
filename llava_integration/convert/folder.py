"""The converted folder: weights, configurations, processor, model card and report; whole or not at all."""

import contextlib
import glob
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, ProcessorMixin

from ..llava_stf import LlavaStfConfig, LlavaStfForConditionalGeneration
from .auto_map import write_auto_map
from .checkpoint import Entries, Entry
from .report import CARD_FILE, ConversionError, Report, Source, blamed_on, model_card

REPORT_FILE = "conversion.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SHARD_BYTES = 2 * 10**9  # what is held in memory, too
HEADER_BYTES = 160  # at most, of a file and of every tensor in it besides its name
SMALL_FILES = 16 * 2**20  # room for a tokenizer and the JSON files

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """All that the new folder holds; `entries` under the model's names, `processor` None without a tokenizer."""

    config: LlavaStfConfig
    entries: Entries
    dtype: torch.dtype
    processor: ProcessorMixin | None
    generation: dict
    source: Source
    report: Report
    auto_map: bool


def check_options(
    src: Path,
    dst: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int | None,
    others: Mapping[str, Path | None],
) -> None:
    """ConversionError for what can be refused before anything is read; `others`: further folders, by option."""
    folders = {"SRC": src} | {name: folder for name, folder in others.items() if folder is not None}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise ConversionError(f"{name}: expected a local folder, got {folder}; download the checkpoint first")
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"--dtype: expected float32, float16 or bfloat16, got {dtype}")
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise ConversionError(f"max_shard_bytes: expected a positive int or None, got {max_shard_bytes!r}")
    _check_destination(dst, list(folders.values()))


def write_folder(dst: Path, conversion: Conversion, max_shard_bytes: int | None, progress: bool) -> Report:
    """Write everything beside `dst`, then rename; returns the report."""
    config, report, entries = conversion.config, conversion.report, conversion.entries
    dtype = conversion.dtype if conversion.dtype in DTYPES else torch.float32
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    config.architectures = [LlavaStfForConditionalGeneration.__name__]
    with blamed_on("SRC: generation_config.json", "correct the file or remove it"):
        GenerationConfig(**conversion.generation)
    size = sum(torch.Size(entry.shape).numel() for entry in entries.values()) * dtype.itemsize
    _check_space(dst, size + SMALL_FILES)
    with whole_folder(dst) as folder:
        with tqdm(total=size, unit="B", unit_scale=True, disable=not (progress and sys.stderr.isatty())) as bar:
            _write_weights(folder, entries, dtype, max_shard_bytes or MAX_SHARD_BYTES, bar.update)
        config.save_pretrained(folder)
        _write_json(folder / "generation_config.json", conversion.generation)
        processor = conversion.processor
        if processor is not None:
            processor.save_pretrained(folder)
        if conversion.auto_map:
            write_auto_map(folder)
        has = {"processor": processor is not None, "auto_map": conversion.auto_map}
        card = model_card(config, conversion.source, report, **has)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        _write_json(folder / REPORT_FILE, report.as_dict())
    report.notes.append(f"{dst}: {len(entries)} tensors, {size / 1e9:.2f} GB, {str(dtype).removeprefix('torch.')}")
    return report


@contextlib.contextmanager
def whole_folder(dst: Path) -> Iterator[Path]:
    """A new folder beside `dst` to write into; it becomes `dst` when the block ends, and vanishes when it fails.

    What a killed run has left is named, and not touched: it may be that of a run at work.
    """
    for left in sorted(dst.parent.glob(f".{glob.escape(dst.name)}.*.partial")):
        _log.warning("convert: %s was left by another run; remove it unless that one is still at work", left)
    partial = dst.parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        yield partial
        for path in [*sorted(partial.rglob("*")), partial]:
            _sync(path)
        _check_destination(dst, [])  # somebody else may have been faster
        partial.rename(dst)
        _sync(dst.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConversionError(
            f"DST: could not write {dst}: {reason}; nothing is left there, make room or choose another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_destination(dst: Path, sources: Sequence[Path]) -> None:
    """ConversionError unless `dst` can be made: it is not there, its parent is, and it lies in no source."""
    if os.path.lexists(dst):
        raise ConversionError(
            f"DST: expected a path where nothing is, got {dst}, which exists; choose another or move it"
        )
    if not dst.parent.is_dir():
        raise ConversionError(f"DST: expected its parent to be a folder, got {dst.parent}, which is not; make it first")
    place = dst.parent.resolve() / dst.name
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ConversionError(f"DST: expected a place outside {source}, which is only read, got {dst}")


def _check_space(dst: Path, needed: int) -> None:
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise ConversionError(
            f"DST: expected {needed / 1e9:.2f} GB free at {dst.parent}, got {free / 1e9:.2f} GB; "
            "free some or choose another disk"
        )


def _write_weights(
    folder: Path, entries: Entries, dtype: torch.dtype, max_bytes: int, advance: Callable[[int], object]
) -> None:
    """`entries` as `dtype` in files of at most `max_bytes`; only a tensor that alone is larger makes a larger file."""
    sizes = {name: torch.Size(entry.shape).numel() * dtype.itemsize for name, entry in entries.items()}
    split = split_state_dict_into_shards_factory(
        {name: sizes[name] + len(name.encode()) + HEADER_BYTES for name in entries},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes - HEADER_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = _cast(name, entries[name], dtype)
            advance(sizes[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file leaves a temporary file's 0600
    if split.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _cast(name: str, entry: Entry, dtype: torch.dtype) -> Tensor:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape:
        raise ConversionError(f"{name}: expected shape {entry.shape}, got {tuple(tensor.shape)}")
    # A copy: two names of one tensor are refused by save_file.
    cast = torch.empty(entry.shape, dtype=dtype).copy_(tensor)
    if dtype == torch.float16 and tensor.dtype != dtype and not cast.isfinite().all() and tensor.isfinite().all():
        raise ConversionError(
            f"--dtype: {name} has values up to {tensor.abs().max().item():.3g}, which float16 cannot hold; "
            "use bfloat16 or float32"
        )
    return cast


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
