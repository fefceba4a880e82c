"""Any folder of a stock LLaVA -> a warm-started LLaVA-STF folder of the same family, tensor by tensor.

`from_llava` makes the projector, the only tensors that are new; tower and language model are copied as they are:

    [model.]vision_tower.[vision_model.]*, [model.]language_model.[model.]*, [language_model.]lm_head.*,
    [model.]multi_modal_projector.linear_{1,2}.*, [model.]image_newline     names of every age that transformers loads
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..core.register import Family, families
from ..warm_start import from_llava
from .checkpoint import EMBEDDINGS, Entry, match, open_weights, read_json, rename, settle_head
from .folder import Target, generation_settings
from .processor import make_processor, read_image_settings, read_tokenizer
from .report import CONFIG, ConversionError, Report, blamed_on
from .tower import tower_name

PROJECTOR = "model.multi_modal_projector."
OPTIONS = {"blocks": "--blocks", "merge_size": "--merge-size", "truncate": "--truncate", "model": "SRC"}
SEED = 0
# Behind "model.", which not all have; the first that fits counts.
PREFIXES = {
    "multi_modal_projector.": PROJECTOR,
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "language_model.": "model.language_model.",
    "lm_head.": "lm_head.",
    "": "model.",
}


@blamed_on("SRC", "get the checkpoint again")  # what no check foresaw
def convert_llava(
    src: str | Path,
    dst: str | Path,
    *,
    blocks: list[int] | None = None,
    merge_size: int | None = None,
    truncate: bool = False,
    **target: Any,
) -> Report:
    """Warm-start LLaVA-STF from the LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision in `src` into the new folder `dst`.

    Args:
        blocks, merge_size, truncate: as for `from_llava`.
        dtype, auto_map, allow_nonfinite: as in `Target`.

    Raises ConversionError, one line; then there is nothing at `dst`.
    """
    src, to = Path(src), Target(Path(dst), **target)
    to.check(SRC=src)
    family, stock_config = _read_config(src)
    report = Report("llava", src, f"a {stock_config.model_type} of transformers")
    entries = rename(open_weights(src), _model_name)
    if not settle_head(entries, stock_config.tie_word_embeddings, report):
        stock_config.tie_word_embeddings = stock_config.text_config.tie_word_embeddings = False
    with blamed_on(CONFIG), torch.device("meta"):
        stock = family.stock(stock_config).eval()
    entries = match(stock, entries, report)
    linears = stock.model.multi_modal_projector.to_empty(device="cpu").to(to.dtype or entries[EMBEDDINGS].dtype)
    with torch.no_grad():
        for name, parameter in linears.named_parameters():
            parameter.copy_(entries.pop(PROJECTOR + name).read())
    report.tensors["mapped"] = [line for line in report.tensors["mapped"] if not line.startswith(PROJECTOR)]
    stf = _warm_start(stock, blocks=blocks, merge_size=merge_size, truncate=truncate)
    for name, tensor in stf.model.multi_modal_projector.state_dict().items():
        made = f"multi_modal_projector.{name.split('.', 1)[1]}, warm start"
        entries[PROJECTOR + name] = Entry(made, tuple(tensor.shape), tensor.dtype, tensor.detach, "")
        report.tensors["created"].append(f"{PROJECTOR}{name} <- {made}")
    r, (side, _) = stf.config.spatial_merge_size, stf.model.vision_grid
    report.notes.append(f"windows of {r}x{r} patches: {side // r}x{side // r} tokens for a grid of {side}x{side}")
    generation = generation_settings([src], stf.config.text_config)
    return to.write(stf.config, entries, _processor(src, stf.config, report), generation, report)


def _warm_start(stock: PreTrainedModel, **options) -> PreTrainedModel:
    """`from_llava`, whose refusals get the command's names; what is about none of them is about the configuration.

    Of `stock`, on the meta device, only the projector has values.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)  # the rows that only training uses: the same in every conversion
            return from_llava(stock, **options)
    except (ValueError, TypeError) as error:
        name, _, rest = str(error).partition(": ")
        rest = rest.replace("truncate=True", "--truncate")
        raise ConversionError(f"{OPTIONS[name]}: {rest}" if name in OPTIONS else f"{CONFIG}: {error}") from error


def _model_name(name: str) -> str | None:
    """The name in today's module tree of a tensor in a checkpoint of any age."""
    bare = name.removeprefix("model.")
    if bare.startswith("vision_tower."):
        return tower_name(name)
    return next((new + bare[len(old) :] for old, new in PREFIXES.items() if bare.startswith(old)), None)


def _read_config(src: Path) -> tuple[Family, PreTrainedConfig]:
    if not (src / "config.json").is_file():
        raise ConversionError(f"SRC: expected config.json in {src}, found none; name the folder of a stock LLaVA")
    content = read_json(src / "config.json")
    kind, known = content.get("model_type"), {family.stock.config_class.model_type: family for family in families()}
    if kind not in known or not ("text_config" in content and "vision_config" in content):
        hints = {family.config.model_type: "this folder is converted already" for family in families()}
        hints |= dict.fromkeys(("llava_llama", "llava_mistral"), "an official LLaVA-STF is converted with `official`")
        what = f"expected model_type {', '.join(map(repr, known))} with text_config and vision_config, got {kind!r}"
        raise ConversionError(f"{CONFIG}: {what}; {hints.get(str(kind), 'name a LLaVA folder of transformers')}")
    if "quantization_config" in content:
        raise ConversionError(f"{CONFIG}: expected no quantization_config; convert a checkpoint that is not quantized")
    with blamed_on(CONFIG):
        return known[kind], known[kind].stock.config_class.from_pretrained(src, local_files_only=True)


def _processor(src: Path, config: PreTrainedConfig, report: Report) -> ProcessorMixin | None:
    tokenizer = read_tokenizer([src], report)
    if tokenizer is None:
        return None
    settings = read_image_settings([src], report)
    content = read_json(src / "processor_config.json", missing_ok=True)
    token = content.get("image_token") or getattr(tokenizer, "image_token", None) or "<image>"
    if (file := src / "chat_template.jinja").is_file():  # the template's place depends on the folder's age
        template = file.read_text(encoding="utf-8")
    else:
        template = read_json(src / "chat_template.json", missing_ok=True).get("chat_template")
        template = template or content.get("chat_template") or tokenizer.chat_template
    return make_processor(settings, tokenizer, config, template, token)
