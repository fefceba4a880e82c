"""Any LLaVA-1.5 folder of transformers -> a warm-started LLaVA-STF folder, tensor by tensor.

`from_llava` makes the projector, the only tensors that are new; tower and language model are copied as they are:

    [model.]vision_tower.[vision_model.]*, [model.]language_model.[model.]*, [language_model.]lm_head.*,
    [model.]multi_modal_projector.linear_{1,2}.*        names of every age that LlavaForConditionalGeneration loads
"""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from ..llava_stf import LlavaStfConfig
from ..processing import LlavaStfProcessor
from ..warm_start import from_llava
from .checkpoint import EMBEDDINGS, Entries, Entry, match, on_meta, open_weights, read_json, rename, settle_head
from .folder import Conversion, check_options, write_folder
from .processor import image_processor, make_processor, read_image_settings, read_tokenizer
from .report import CONFIG, ConversionError, Report, Source, blamed_on
from .tower import tower_name

PROJECTOR = "model.multi_modal_projector."
OPTIONS = {"blocks": "--blocks", "merge_size": "--merge-size", "truncate": "--truncate", "model": "SRC"}
SEED = 0


def convert_llava(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: torch.dtype | None = None,
    blocks: list[int] | None = None,
    merge_size: int = 2,
    truncate: bool = False,
    auto_map: bool = False,
    max_shard_bytes: int | None = None,
    progress: bool = False,
) -> Report:
    """Warm-start LLaVA-STF from the LLaVA-1.5 in `src` into the new folder `dst`.

    Args:
        dtype: float32, float16 or bfloat16; default: the embeddings' own.
        blocks, merge_size, truncate: as for `from_llava`.
        auto_map, max_shard_bytes, progress: as for `convert_official`.

    Raises ConversionError, one line; then there is nothing at `dst`.
    """
    src, dst = Path(src), Path(dst)
    check_options(src, dst, dtype, max_shard_bytes, {})
    report = Report()
    stock_config = _read_config(src)
    entries, sources = rename(open_weights(src), _model_name)
    if not settle_head(entries, sources, stock_config.tie_word_embeddings, report):
        stock_config.tie_word_embeddings = stock_config.text_config.tie_word_embeddings = False
    stock = on_meta(lambda: LlavaForConditionalGeneration(stock_config).eval())
    entries = match(stock, entries, sources, report)
    dtype = dtype or entries[EMBEDDINGS].dtype

    config, projector = _warm_start(stock, entries, dtype, blocks, merge_size, truncate)
    report.tensors["mapped"] = [line for line in report.tensors["mapped"] if not line.startswith(PROJECTOR)]
    entries = {name: entry for name, entry in entries.items() if not name.startswith(PROJECTOR)}
    for name, tensor in projector.state_dict().items():
        read = lambda tensor=tensor: tensor  # noqa: E731
        entries[PROJECTOR + name] = Entry(tuple(tensor.shape), tensor.dtype, read, "warm start", "created")
        report.tensors["created"].append(
            f"{PROJECTOR}{name} <- multi_modal_projector.{name.split('.', 1)[1]}, warm start"
        )

    conversion = Conversion(
        config=config,
        entries=entries,
        dtype=dtype,
        processor=_processor(src, config, report),
        generation=_generation(src, config),
        source=Source("llava", src, "a LLaVA-1.5 of transformers"),
        report=report,
        auto_map=auto_map,
    )
    return write_folder(dst, conversion, max_shard_bytes, progress)


def _model_name(name: str) -> str | None:
    """The name in today's module tree of a tensor in a checkpoint of any age."""
    bare = name.removeprefix("model.")
    if bare.startswith("vision_tower."):
        return tower_name(name)
    if bare.startswith("multi_modal_projector."):
        return "model." + bare
    if re.match(r"(language_model\.)?lm_head\.", bare):
        return bare.removeprefix("language_model.")
    if bare.startswith("language_model."):
        return "model.language_model." + bare.removeprefix("language_model.").removeprefix("model.")
    return None


def _read_config(src: Path) -> LlavaConfig:
    if not (src / "config.json").is_file():
        raise ConversionError(f"SRC: expected config.json in {src}, found none; name the folder of a LLaVA-1.5")
    content = read_json(src / "config.json")
    kind = content.get("model_type")
    if kind != "llava" or not ("text_config" in content and "vision_config" in content):
        hint = "name a LLaVA-1.5 folder of transformers"
        if kind == "llava_stf":
            hint = "this folder is converted already"
        elif str(kind).startswith("llava_") or kind == "llava":
            hint = "an official LLaVA-STF is converted with `official`"
        raise ConversionError(
            f"{CONFIG}: expected model_type 'llava' with text_config and vision_config, got {kind!r}; {hint}"
        )
    if "quantization_config" in content:
        raise ConversionError(f"{CONFIG}: expected no quantization_config; convert a checkpoint that is not quantized")
    with blamed_on(CONFIG):
        return LlavaConfig.from_pretrained(src, local_files_only=True)


def _warm_start(
    stock: LlavaForConditionalGeneration,
    entries: Entries,
    dtype: torch.dtype,
    blocks: list[int] | None,
    merge_size: int,
    truncate: bool,
) -> tuple[LlavaStfConfig, nn.Module]:
    """Configuration and projector; of `stock`, on the meta device, only the two linears get values."""
    linears = stock.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, parameter in linears.named_parameters():
            parameter.copy_(entries[PROJECTOR + name].read())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)  # the rows that only training uses: the same in every conversion
            stf = from_llava(stock, blocks=blocks, merge_size=merge_size, truncate=truncate)
    except (ValueError, TypeError) as error:
        raise ConversionError(_by_option(str(error))) from error
    return stf.config, stf.model.multi_modal_projector


def _by_option(message: str) -> str:
    """An error of `from_llava` under the command's names; what is about none of them is about the configuration."""
    name, _, rest = message.partition(": ")
    rest = rest.replace("truncate=True", "--truncate")
    return f"{OPTIONS[name]}: {rest}" if name in OPTIONS else f"{CONFIG}: {message}"


def _processor(src: Path, config: LlavaStfConfig, report: Report) -> LlavaStfProcessor | None:
    tokenizer = read_tokenizer([src], report)
    if tokenizer is None:
        return None
    settings = read_image_settings([src], report)
    images = image_processor(config.vision_config, settings, bool(settings.get("do_pad")))
    content = read_json(src / "processor_config.json") if (src / "processor_config.json").is_file() else {}
    token = content.get("image_token") or getattr(tokenizer, "image_token", None) or "<image>"
    return make_processor(images, tokenizer, config, _template(src, content, tokenizer), token)


def _template(src: Path, content: dict, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The source's own chat template, from whichever file its age put it in."""
    if (src / "chat_template.jinja").is_file():
        return (src / "chat_template.jinja").read_text(encoding="utf-8")
    if (src / "chat_template.json").is_file():
        return read_json(src / "chat_template.json").get("chat_template")
    return content.get("chat_template") or tokenizer.chat_template


def _generation(src: Path, config: LlavaStfConfig) -> dict:
    if (src / "generation_config.json").is_file():
        return read_json(src / "generation_config.json")
    text = config.text_config
    return {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("bos", "eos", "pad")}
