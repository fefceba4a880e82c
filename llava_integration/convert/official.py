"""An official LLaVA-STF checkpoint -> a folder of transformers. Names of its tensors and where they go:

    model.mm_projector_crosslayer.{0,2}            -> model.multi_modal_projector.mbtf.linear_{1,2}
    model.mm_projector.0                           -> model.multi_modal_projector.stf.linear_1   now patch-major
    model.mm_projector.2                           -> model.multi_modal_projector.stf.linear_2
    model.vision_tower.vision_tower.vision_model.* -> model.vision_tower.*
    model.{embed_tokens,layers,norm}.*             -> model.language_model.*
    lm_head.*                                      -> lm_head.*

Blocks, window and widths are not in config.json; the shapes of the projector's tensors say them:

    mm_projector_crosslayer.0 [H1, M*C]   .2 [C, H1]        MBTF; absent in a model with STF alone
    mm_projector.0            [H2, r*r*C] .2 [D, H2]        STF, channel-major
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from stf_kernels import channel_to_patch_major

from ..core.config import published_blocks, resolve_layers, vision_grid
from ..llava_stf import LlavaStfConfig, LlavaStfForConditionalGeneration
from .base import read_parts
from .checkpoint import EMBEDDINGS, HEAD, Entries, match, rename, settle_head
from .folder import Target, generation_settings
from .processor import VICUNA_V1, make_processor, read_image_settings, read_tokenizer, settle_vocabulary
from .report import CONFIG, ConversionError, Report, blamed_on, passed_on
from .tower import PREFIX as TOWER
from .tower import find_tower, tower_name

PROJECTOR = "model.multi_modal_projector."
PROJECTOR_NAME = re.compile(r"^(?:.*\.)?(mm_projector(?:_crosslayer)?)\.([02])\.(weight|bias)$")
CHILDREN = {"mm_projector_crosslayer": "mbtf", "mm_projector": "stf"}
LINEARS = {"0": "linear_1", "2": "linear_2"}
CHANNEL_MAJOR = PROJECTOR + "stf.linear_1.weight"
LANGUAGE = re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)")
PUBLISHED_SELECT = -2
EXPECTED = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
LANGUAGE_MODELS = ("llava_llama", "llava", "llama", "llava_mistral", "mistral")
ROPE_FIELDS = ("rope_theta", "rope_scaling")  # of files before transformers 5
NOT_FIELDS = ("model_type", "transformers_version", "architectures", "dtype", "_name_or_path")


@blamed_on("SRC", "get the checkpoint again")  # what no check foresaw
def convert_official(
    src: str | Path,
    dst: str | Path,
    *,
    blocks: list[int] | None = None,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    **target: Any,
) -> Report:
    """Convert the official checkpoint in `src` to the new folder `dst`.

    Args:
        blocks: layers of the tower in concatenation order, where the checkpoint is not the published one.
        base: folder of the language model, for the pretrain form and for LoRA.
        vision_tower: folder of the CLIP or SigLIP model, where config.json does not name a local one.
        dtype, auto_map, allow_nonfinite: as in `Target`.

    Raises ConversionError, one line; then there is nothing at `dst`.
    """
    src, to = Path(src), Target(Path(dst), **target)
    base, tower_folder = (None if path is None else Path(path) for path in (base, vision_tower))
    to.check(**{"SRC": src, "--base": base, "--vision-tower": tower_folder})
    parts = read_parts(src, base, projector_name)
    tower = find_tower(parts.config.get("mm_vision_tower"), src, tower_folder)
    report = Report("official", src, parts.form, tower.name)
    for name, value in EXPECTED.items():
        if (got := parts.config.get(name, value)) != value:
            raise ConversionError(f"{CONFIG}: {name}: expected {value!r}, got {got!r}, another model")
    if "anyres" in str(ratio := parts.config.get("image_aspect_ratio")):
        raise ConversionError(f"{CONFIG}: image_aspect_ratio: expected 'pad' or 'square', got {ratio!r}, another model")

    entries = rename(parts.entries, _model_name)
    # First: a foreign checkpoint is told before its tower is missed.
    count, geometry = derive(entries, tower.config.hidden_size)
    if not any(name.startswith(TOWER) for name in entries):
        entries |= tower.weights()
    tied = settle_head(entries, bool(parts.config.get("tie_word_embeddings")), report)
    tokenizer = read_tokenizer(parts.folders, report)
    embeddings = _shape(entries, EMBEDDINGS)
    if embeddings is None:
        raise ConversionError(f"SRC: {EMBEDDINGS}: expected a matrix of embeddings, got none; complete the checkpoint")
    rows, image_token_id, pad_token_id = settle_vocabulary(tokenizer, embeddings[0])
    text = _text_config(parts.config, rows)
    text.pad_token_id, text.tie_word_embeddings = pad_token_id, tied
    if tower.config.model_type == "siglip_vision_model":  # its pooling head is not in every checkpoint; nobody reads it
        tower.config.vision_use_head = any(name.startswith(TOWER + "head.") for name in entries)
    selected, grid = parts.config.get("mm_vision_select_layer"), vision_grid(tower.config)
    layers = block_layers(count, tower.config.num_hidden_layers, selected, blocks)
    with passed_on("SRC: "):
        config = LlavaStfConfig(
            vision_config=tower.config,
            text_config=text,
            image_token_index=image_token_id,
            tie_word_embeddings=tied,
            vision_feature_layer=layers,
            spatial_merge_truncate=any(side % geometry["spatial_merge_size"] for side in grid),
            **geometry,
        )
    if config.spatial_merge_truncate:
        report.notes.append(f"the last rows and columns of the {grid} grid are dropped, as there")

    for name in {EMBEDDINGS, HEAD} & entries.keys():
        if entries[name].shape[0] < rows:
            shape = (rows, *entries[name].shape[1:])
            entries[name] = entries[name].then("resized", partial(_with_rows, rows=rows), shape)
    if config.spatial_merge_size > 1:  # in a window of one token both orders are the same
        relay = partial(channel_to_patch_major, merge_size=config.spatial_merge_size)
        entries[CHANNEL_MAJOR] = entries[CHANNEL_MAJOR].then("relaid out", relay)
    with blamed_on(CONFIG), torch.device("meta"):
        model = LlavaStfForConditionalGeneration(config)
    matched = match(model, entries, report)

    processor = None
    if tokenizer is not None:
        folders = [*parts.folders, tower.folder] if tower.folder else parts.folders
        settings = read_image_settings(folders, report)
        settings["do_pad"] = parts.config.get("image_aspect_ratio") == "pad"
        processor = make_processor(settings, tokenizer, config, VICUNA_V1)
    generation = generation_settings(parts.folders, text) | {"pad_token_id": pad_token_id}
    return to.write(config, matched, processor, generation, report)


def projector_name(name: str) -> str | None:
    """model.mm_projector.0.weight -> model.multi_modal_projector.stf.linear_1.weight; None for anything else."""
    found = PROJECTOR_NAME.match(name)
    return None if found is None else f"{PROJECTOR}{CHILDREN[found[1]]}.{LINEARS[found[2]]}.{found[3]}"


def _model_name(name: str) -> str | None:
    if name.startswith("model.vision_tower."):
        return tower_name(name)
    return projector_name(name) or (LANGUAGE.sub("model.language_model.", name) if LANGUAGE.match(name) else None)


def derive(entries: Entries, channels: int) -> tuple[int, dict]:
    """Blocks and fields of LlavaStfConfig by the projector in `entries`; `channels`: of the tower."""
    stf, mbtf = (_shape(entries, f"{child}.linear_1.weight") for child in ("stf", "mbtf"))
    if stf is None:
        got = f"tensors such as {next(iter(entries), None)}; a LLaVA of transformers is converted with `llava`"
        raise ConversionError(f"SRC: expected an official LLaVA-STF checkpoint with an mm_projector, got {got}")
    if mbtf is None and stf[1] == channels:
        raise ConversionError("SRC: mm_projector reads single tokens, so this is LLaVA-1.5, not LLaVA-STF; use `llava`")
    area = _multiple(stf[1], channels, "mm_projector.0.weight")
    merge_size = math.isqrt(area)
    if merge_size**2 != area:
        raise ConversionError(f"SRC: mm_projector.0.weight: expected a square window of tokens, got {area} tokens")
    fields = {
        "spatial_merge_size": merge_size,
        "use_mbtf": mbtf is not None,
        "mbtf_hidden_size": mbtf and mbtf[0],
        "stf_hidden_size": stf[0],
        "multimodal_projector_bias": any(name.startswith(PROJECTOR) and name.endswith(".bias") for name in entries),
    }
    return 1 if mbtf is None else _multiple(mbtf[1], channels, "mm_projector_crosslayer.0.weight"), fields


def _shape(entries: Entries, name: str) -> tuple[int, ...] | None:
    entry = entries.get(name if name in entries else PROJECTOR + name)
    if entry is not None and len(entry.shape) != 2:
        raise ConversionError(f"SRC: {name}: expected a matrix, got shape {list(entry.shape)}")
    return None if entry is None else entry.shape


def _multiple(columns: int, channels: int, name: str) -> int:
    if columns % channels:
        remedy = "name the right tower with --vision-tower DIR"
        raise ConversionError(f"SRC: {name}: expected columns in multiples of {channels}, got {columns}; {remedy}")
    return columns // channels


def block_layers(count: int, layers: int, selected: object, given: list[int] | None) -> list[int]:
    """The tower's layers in concatenation order: as given, as config.json lists them, or by the published rule."""
    if given is not None:
        with passed_on():
            blocks = resolve_layers(given, layers, "--blocks")
        if len(blocks) != count:
            raise ConversionError(f"--blocks: expected {count} layers, as many as the checkpoint's, got {given}")
        return blocks
    if isinstance(selected, list) and len(selected) == count:
        with passed_on():
            return resolve_layers(selected, layers, f"{CONFIG}: mm_vision_select_layer")
    selected = PUBLISHED_SELECT if selected is None else selected
    if count == 1 and isinstance(selected, int):
        return [selected]
    published = published_blocks(layers + 1 + PUBLISHED_SELECT)
    if selected == PUBLISHED_SELECT and len(published) == count:
        return published
    what = f"the checkpoint does not name its {count} blocks of a tower of {layers} layers"
    raise ConversionError(f"--blocks: {what}; name them in the order of the concatenation, e.g. --blocks 5,3,1")


def _text_config(content: dict, rows: int) -> PreTrainedConfig:
    """`content`: config.json, in which vision and training fields lie beside those of the language model."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in LANGUAGE_MODELS or "text_config" in content:
        hints = {"llava": "; a LLaVA-1.5 is converted with `llava`", "llava_stf": "; this folder is converted already"}
        raise ConversionError(f"{CONFIG}: expected model_type llava_llama, got {kind!r}{hints.get(str(kind), '')}")
    make = MistralConfig if kind.endswith("mistral") else LlamaConfig
    known = make().to_dict().keys() - set(NOT_FIELDS) | set(ROPE_FIELDS)
    fields = {name: value for name, value in content.items() if name in known and value is not None}
    with blamed_on(CONFIG):
        return make(**fields | {"vocab_size": rows})


def _with_rows(weight: Tensor, rows: int) -> Tensor:
    """New rows are the mean of the old ones: their logit is the average logit, so they never win by accident."""
    mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), *mean.shape)])
