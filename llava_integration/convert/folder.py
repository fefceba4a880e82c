"""The converted folder: weights, configurations, processor, model card and report; whole or not at all."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, ProcessorMixin

from ..configuration import LlavaStfConfig
from ..modeling import LlavaStfForConditionalGeneration
from .atomic import check_destination, check_space, whole_folder
from .auto_map import write_auto_map
from .card import CARD_FILE, Source, model_card
from .checkpoint import Entry
from .errors import ConversionError, blamed_on
from .report import Report
from .writer import DTYPE_NAMES, MAX_SHARD_BYTES, Output, write_shards

REPORT_FILE = "conversion.json"
SMALL_FILES = 16 * 2**20  # room for a tokenizer and the JSON files


@dataclass(frozen=True)
class Conversion:
    """All that the new folder holds; `entries` under the model's names, `processor` None without a tokenizer."""

    config: LlavaStfConfig
    entries: Mapping[str, Entry]
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
    for name, folder in {"SRC": src, **others}.items():
        if folder is not None and not folder.is_dir():
            raise ConversionError(f"{name}: expected a local folder, got {folder}; download the checkpoint first")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConversionError(f"--dtype: expected float32, float16 or bfloat16, got {dtype}")
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise ConversionError(f"max_shard_bytes: expected a positive int or None, got {max_shard_bytes!r}")
    check_destination(dst, [src, *(folder for folder in others.values() if folder is not None)])


def write_folder(dst: Path, conversion: Conversion, max_shard_bytes: int | None, progress: bool) -> Report:
    """Write everything beside `dst`, then rename; returns the report."""
    config, report = conversion.config, conversion.report
    dtype = conversion.dtype if conversion.dtype in DTYPE_NAMES else torch.float32
    config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    config.architectures = [LlavaStfForConditionalGeneration.__name__]
    with blamed_on("SRC: generation_config.json", "correct the file or remove it"):
        GenerationConfig(**conversion.generation)
    outputs = [Output(name, entry.shape, entry.read) for name, entry in conversion.entries.items()]
    size = sum(output.numel for output in outputs) * dtype.itemsize
    check_space(dst, size + SMALL_FILES)
    with whole_folder(dst) as folder:
        with tqdm(total=size, unit="B", unit_scale=True, disable=not (progress and sys.stderr.isatty())) as bar:
            write_shards(folder, outputs, dtype, max_shard_bytes or MAX_SHARD_BYTES, bar.update)
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
    report.notes.append(f"{dst}: {len(outputs)} tensors, {size / 1e9:.2f} GB, {str(dtype).removeprefix('torch.')}")
    return report


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
