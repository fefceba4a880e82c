"""The converted folder: weights, configurations, processor, model card and report; whole or not at all."""

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig

from ..core.register import family_of
from .auto_map import write_auto_map
from .checkpoint import DTYPES, EMBEDDINGS, Entries, Entry, read_json
from .report import CARD_FILE, ConversionError, Report, blamed_on, model_card

MAX_SHARD_BYTES = 2 * 10**9  # what is held in memory, too


@dataclass(frozen=True)
class Target:
    """Where and how a conversion is written.

    Args:
        dtype: float32, float16 or bfloat16; default: the embeddings' own.
        auto_map: write the code that trust_remote_code=True takes; without stf_kernels it runs in plain torch.
        allow_nonfinite: a weight that holds NaN or infinity is a warning of the report, not a refusal.
    """

    dst: Path
    dtype: torch.dtype | None = None
    auto_map: bool = False
    allow_nonfinite: bool = False

    def check(self, **sources: Path | None) -> None:
        """ConversionError for what can be refused before anything is read; `sources`: folders, by option."""
        folders = {name: folder for name, folder in sources.items() if folder is not None}
        for name, folder in folders.items():
            if not folder.is_dir():
                raise ConversionError(f"{name}: expected a local folder, got {folder}; download the checkpoint first")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConversionError(f"--dtype: expected float32, float16 or bfloat16, got {self.dtype}")
        _check_destination(self.dst, *folders.values())

    def write(self, config: PreTrainedConfig, entries: Entries, processor, generation: dict, report: Report) -> Report:
        """Write everything beside `dst`, then rename; returns the report.

        `entries`: under the model's names; `processor`: None without a tokenizer.
        """
        dtype = self.dtype or entries[EMBEDDINGS].dtype
        dtype = dtype if dtype in DTYPES else torch.float32
        config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
        family = family_of(config)
        config.architectures = [family.generator.__name__]
        with blamed_on("SRC: generation_config.json", "correct the file or remove it"):
            GenerationConfig(**generation)
        size = sum(math.prod(entry.shape) for entry in entries.values()) * dtype.itemsize
        with whole_folder(self.dst) as folder:
            with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
                warnings = report.warnings if self.allow_nonfinite else None
                _write_weights(folder, entries, dtype, bar.update, warnings)
            config.save_pretrained(folder)
            _write_json(folder / "generation_config.json", generation)
            if processor is not None:
                processor.save_pretrained(folder)
            if self.auto_map:
                write_auto_map(folder, family)
            card = model_card(config, report, processor=processor is not None, auto_map=self.auto_map)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            content = {"tensors": report.tensors, "notes": report.notes, "warnings": report.warnings}
            _write_json(folder / "conversion.json", content)
        kind = str(dtype).removeprefix("torch.")
        report.notes.append(f"{self.dst}: {len(entries)} tensors, {size / 1e9:.2f} GB, {kind}")
        return report


def generation_settings(folders: Sequence[Path], text: PreTrainedConfig) -> dict:
    """generation_config.json, without flags that greedy search ignores and transformers refuses; else token ids."""
    file = next((path for folder in folders if (path := folder / "generation_config.json").is_file()), None)
    content = read_json(file) if file else {}
    ignored = () if content.get("do_sample") else ("temperature", "top_p", "top_k")
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return ids | {name: value for name, value in content.items() if name not in ignored}


@contextlib.contextmanager
def whole_folder(dst: Path) -> Iterator[Path]:
    """A new folder beside `dst` to write into; it becomes `dst` when the block ends, and vanishes when it fails."""
    partial = dst.parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        yield partial
        for path in [*sorted(partial.rglob("*")), partial]:
            _sync(path)
        _check_destination(dst)  # somebody else may have been faster
        partial.rename(dst)
        _sync(dst.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConversionError(f"DST: could not write {dst}: {reason}; nothing is left there, choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_destination(dst: Path, *sources: Path) -> None:
    """ConversionError unless `dst` can be made: it is not there, its parent is, and it lies in no source."""
    if os.path.lexists(dst):
        raise ConversionError(f"DST: expected a path where nothing is, got {dst}, which exists; choose another")
    if not dst.parent.is_dir():
        raise ConversionError(f"DST: expected its parent to be a folder, got {dst.parent}, which is not; make it first")
    place = dst.parent.resolve() / dst.name
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ConversionError(f"DST: expected a place outside {source}, which is only read, got {dst}")


def _write_weights(
    folder: Path, entries: Entries, dtype: torch.dtype, advance: Callable[[int], object], warnings: list[str] | None
) -> None:
    """`entries` as `dtype` in files of MAX_SHARD_BYTES and a header, or of one tensor that is larger."""
    sizes = {name: math.prod(entry.shape) * dtype.itemsize for name, entry in entries.items()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = _cast(name, entries[name], dtype, warnings)
            advance(sizes[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file leaves a temporary file's 0600
    if split.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _cast(name: str, entry: Entry, dtype: torch.dtype, warnings: list[str] | None) -> Tensor:
    tensor = entry.read()
    if bad := tensor.numel() - int(tensor.isfinite().sum()):
        found = f"{entry.name} in {entry.origin}: {bad} of {tensor.numel()} values are NaN or infinite"
        if warnings is None:
            raise ConversionError(f"SRC: {found}; expected numbers: get the file again, or pass --allow-nonfinite")
        warnings.append(found)
    # A copy: two names of one tensor are refused by save_file.
    cast = torch.empty(entry.shape, dtype=dtype).copy_(tensor)
    if dtype == torch.float16 and tensor.dtype != dtype and not cast.isfinite().all() and tensor.isfinite().all():
        what = f"{name} has values up to {tensor.abs().max().item():.3g}, which float16 cannot hold"
        raise ConversionError(f"--dtype: {what}; use bfloat16 or float32")
    return cast


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
