"""An official LLaVA-STF checkpoint -> a folder of transformers. Names of its tensors and where they go:

    model.mm_projector_crosslayer.{0,2}            -> model.multi_modal_projector.mbtf.linear_{1,2}
    model.mm_projector.0                           -> model.multi_modal_projector.stf.linear_1   now patch-major
    model.mm_projector.2                           -> model.multi_modal_projector.stf.linear_2
    model.vision_tower.vision_tower.vision_model.* -> model.vision_tower.*
    model.{embed_tokens,layers,norm}.*             -> model.language_model.*
    lm_head.*                                      -> lm_head.*

Also from the pretrain form (mm_projector.bin and a base) and from LoRA adapters (and their base).
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from stf_kernels import channel_to_patch_major

from ..configuration import LlavaStfConfig, vision_grid
from ..modeling import LlavaStfForConditionalGeneration
from .buffers import computed
from .card import Source
from .checkpoint import Entries, Entry, read_json
from .errors import ConversionError, blamed_on
from .folder import Conversion, check_options, write_folder
from .geometry import RELAID_OUT, Geometry, block_layers, derive, projector_name
from .language import text_config
from .parts import read_parts
from .plan import match, on_meta, rename, shapes_of
from .processor import image_processor, make_processor, read_image_settings, read_tokenizer
from .report import Report
from .template import VICUNA_V1
from .tied import settle
from .tower import PREFIX as TOWER
from .tower import Tower, find_tower, tower_name
from .vocabulary import EMBEDDINGS, add_tokens, resize, without_tokenizer

LANGUAGE = re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)")


def convert_official(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    blocks: list[int] | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    auto_map: bool = False,
    max_shard_bytes: int | None = None,
    progress: bool = False,
) -> Report:
    """Convert the official checkpoint in `src` to the new folder `dst`.

    Args:
        dtype: float32, float16 or bfloat16; default: the embeddings' own.
        blocks: layers of the tower in concatenation order, where the checkpoint is not the published one.
        base: folder of the language model, for the pretrain form and for LoRA.
        vision_tower: folder of the CLIP or SigLIP model, where config.json does not name a local one.
        auto_map: write the code that trust_remote_code=True takes; without stf_kernels it runs in plain torch.
        max_shard_bytes: upper limit of a file, 5 GB by default.
        progress: show a bar on a terminal.

    Raises ConversionError, one line; then there is nothing at `dst`.
    """
    src, dst = Path(src), Path(dst)
    base, tower_folder = (None if path is None else Path(path) for path in (base, vision_tower))
    check_options(src, dst, dtype, max_shard_bytes, {"--base": base, "--vision-tower": tower_folder})
    report = Report()
    parts = read_parts(src, base)
    tower = find_tower(parts.config.get("mm_vision_tower"), src, tower_folder)
    _check_config(parts.config, tower.config)

    entries, sources = rename(parts.entries, _name)
    if not any(name.startswith(TOWER) for name in entries):
        geometry = derive(entries, tower.config.hidden_size)  # a foreign checkpoint is told before its tower is missed
        weights = tower.weights()
        entries |= weights
        sources |= {name: f"{tower.name}: {name.removeprefix(TOWER)}" for name in weights}
    else:
        geometry = derive(entries, tower.config.hidden_size)
    tied = settle(entries, sources, bool(parts.config.get("tie_word_embeddings")), report)
    if EMBEDDINGS not in entries or len(entries[EMBEDDINGS].shape) != 2:
        got = f"shape {list(entries[EMBEDDINGS].shape)}" if EMBEDDINGS in entries else "none"
        raise ConversionError(
            f"SRC: model.embed_tokens.weight: expected a matrix [tokens, width], got {got}; complete the checkpoint"
        )
    rows = entries[EMBEDDINGS].shape[0]

    tokenizer = read_tokenizer(parts.folders, report)
    vocabulary = without_tokenizer(rows) if tokenizer is None else add_tokens(tokenizer, rows)
    text = text_config(parts.config, vocabulary.rows)
    text.pad_token_id, text.tie_word_embeddings = vocabulary.pad_token_id, tied
    _has_head(tower.config, entries)
    config = _config(geometry, tower, text, parts.config, blocks, vocabulary.image_token_id)
    if config.spatial_merge_truncate:
        report.notes.append(f"the last rows and columns of the {vision_grid(tower.config)} grid are dropped, as there")

    entries = resize(entries, vocabulary.rows)
    if RELAID_OUT in entries:
        entries[RELAID_OUT] = _relaid_out(entries[RELAID_OUT], geometry.merge_size)
    with blamed_on("SRC: config.json", "get the file again"):
        model = on_meta(lambda: LlavaStfForConditionalGeneration(config))
    matched = match(shapes_of(model), entries, sources, computed, report)

    pad = parts.config.get("image_aspect_ratio") == "pad"
    settings = read_image_settings([*parts.folders, *([tower.folder] if tower.folder else [])], report)
    processor = None
    if tokenizer is not None:
        images = image_processor(tower.config, settings, pad)
        processor = make_processor(images, tokenizer, config, VICUNA_V1)
    return write_folder(
        dst,
        Conversion(
            config=config,
            entries=matched,
            dtype=dtype or matched[EMBEDDINGS].dtype,
            processor=processor,
            generation=_generation(parts.folders, text),
            source=Source("official", src, parts.form, tower.name),
            report=report,
            auto_map=auto_map,
        ),
        max_shard_bytes,
        progress,
    )


def _name(name: str) -> str | None:
    if name.startswith("model.vision_tower."):
        return tower_name(name)
    return projector_name(name) or (LANGUAGE.sub("model.language_model.", name) if LANGUAGE.match(name) else None)


def _check_config(content: dict, vision: PreTrainedConfig) -> None:
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
    for name, value in expected.items():
        if content.get(name, value) != value:
            raise ConversionError(f"SRC: config.json: {name}: expected {value!r}, got {content[name]!r}, another model")
    if "anyres" in str(content.get("image_aspect_ratio")):
        raise ConversionError(
            f"SRC: config.json: image_aspect_ratio: expected 'pad' or 'square', got {content['image_aspect_ratio']!r}; "
            "images cut in tiles are another model"
        )
    if content.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ConversionError(
            f"SRC: config.json: mm_hidden_size: expected {vision.hidden_size} of the vision tower, got "
            f"{content['mm_hidden_size']}; name the right one with --vision-tower DIR"
        )


def _has_head(vision: PreTrainedConfig, entries: Entries) -> None:
    """SigLIP's pooling head is not part of every checkpoint, and no LLaVA reads it."""
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = any(name.startswith(TOWER + "head.") for name in entries)


def _config(
    geometry: Geometry, tower: Tower, text: PreTrainedConfig, content: dict, blocks: list[int] | None, image_token: int
) -> LlavaStfConfig:
    vision = tower.config
    layers = block_layers(geometry, vision.num_hidden_layers, content.get("mm_vision_select_layer"), blocks)
    if geometry.width != text.hidden_size:
        raise ConversionError(
            f"SRC: mm_projector.2.weight: expected {text.hidden_size} rows, the language model's width, "
            f"got {geometry.width}; it belongs to another language model"
        )
    height, width = vision_grid(vision)
    try:
        return LlavaStfConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token,
            projector_hidden_act="gelu",
            multimodal_projector_bias=geometry.bias,
            tie_word_embeddings=text.tie_word_embeddings,
            vision_feature_layer=layers,
            spatial_merge_size=geometry.merge_size,
            spatial_merge_truncate=bool(height % geometry.merge_size or width % geometry.merge_size),
            use_mbtf=geometry.mbtf_hidden is not None,
            mbtf_hidden_size=geometry.mbtf_hidden,
            stf_hidden_size=geometry.stf_hidden,
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"SRC: {error}") from error


def _relaid_out(entry: Entry, merge_size: int) -> Entry:
    if merge_size == 1:
        return entry  # both orders are the same
    return replace(entry, read=lambda: channel_to_patch_major(entry.read(), merge_size), how="relaid out")


def _generation(folders: list[Path], text: PreTrainedConfig) -> dict:
    """Sampling as the checkpoint sets it; flags that greedy search would ignore are refused by transformers."""
    file = next((path for folder in folders if (path := folder / "generation_config.json").is_file()), None)
    content = read_json(file) if file else {}
    names = ["bos_token_id", "eos_token_id"]
    if content.get("do_sample"):
        names += ["do_sample", "temperature", "top_p", "top_k"]
    kept = {name: content[name] for name in names if content.get(name) is not None}
    ids = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
    return ids | kept | {"pad_token_id": text.pad_token_id}
