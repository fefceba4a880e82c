"""README.md of a converted folder: where it comes from, under which licences, how its weights are laid out."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load

from ..configuration import LlavaStfConfig
from .report import KINDS, Report

CARD_FILE = "README.md"
PAPER = "Learning Compact Vision Tokens for Efficient Large Multimodal Models (arXiv 2506.07138)"
OFFICIAL_LICENCE = "cc-by-nc-4.0"
REMOTE = """
Or, without that import, with `trust_remote_code=True` in both calls: the code beside the weights takes the package
where it is installed, and plain torch where it is not.
"""


@dataclass(frozen=True)
class Source:
    """`command`: "official" or "llava"; `form`: what SRC was; `tower`: the vision tower's name, empty if unknown."""

    command: str
    folder: Path
    form: str
    tower: str = ""


PROCESSOR = '\nprocessor = AutoProcessor.from_pretrained("this folder")'


def model_card(config: LlavaStfConfig, source: Source, report: Report, *, processor: bool, auto_map: bool) -> str:
    """The card's text; folders appear by their names, never with a path. `processor`, `auto_map`: what is there."""
    licence, licences = _licences(source)
    layers = ", ".join(map(str, config.vision_feature_layer))
    counts = "\n".join(f"* {kind}: {len(report.tensors[kind])}" for kind in KINDS if report.tensors.get(kind))
    warnings = "".join(f"* warning: {line}\n" for line in report.warnings)
    remote = REMOTE if auto_map else ""
    imported, made = (", AutoProcessor", PROCESSOR) if processor else ("", "")
    tower = f", vision tower {source.tower}" if source.tower else ""
    window = config.spatial_merge_size
    return f"""---
license: {licence}
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
- llava_stf
---

# LLaVA-STF from {_name(source.folder)}

{config.image_seq_length} image tokens per image: {PAPER}.

## Source

`{_name(source.folder)}`, {source.form}{tower}; converted with `python -m llava_integration.convert {source.command}`.
{_origin(source, report)}

## Licences

{licences}

## Layout

* blocks of the vision tower, in concatenation order: {layers}
* window of {window}x{window} patches per token
* element order of the merged axis: **{config.feature_order}**, `(dy * {window} + dx) * C + c`
* projector: `model.multi_modal_projector.mbtf` and `.stf`, each `linear_1`, `linear_2`
* `conversion.json` says of every tensor where it comes from:

{counts}
{warnings}
## Use

```python
import llava_integration  # from the stf-kernels package; registers the model
from transformers import AutoModelForImageTextToText{imported}

model = AutoModelForImageTextToText.from_pretrained("this folder"){made}
```
{remote}"""


def _name(folder: Path) -> str:
    """The folder's name; in the hub's cache, models--OWNER--NAME/snapshots/COMMIT, OWNER/NAME at COMMIT."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')} at {folder.name}"
    return folder.name


def _origin(source: Source, report: Report) -> str:
    if source.command == "official":
        said = ["The image token was given an id in the vocabulary."]
        if report.tensors.get("relaid out"):
            said.append(
                "`mm_projector.0.weight` was channel-major there (`c * r * r + dy * r + dx`) and was relaid out once."
            )
        if report.tensors.get("resized"):
            said.append("Rows up to a multiple of 64 were added to the embeddings, each the mean of the others.")
        return " ".join(said)
    return (
        "The projector was made, not trained: its output is the average of the source's image tokens over each window, "
        "exactly in real arithmetic. It is a starting point for fine-tuning."
    )


def _licences(source: Source) -> tuple[str, str]:
    own = _declared(source.folder)
    if source.command == "official":
        text = (
            "* The weights of the official LLaVA-STF are under CC-BY-NC-4.0: no commercial use.\n"
            "* The language model keeps its own licence (LLaMA 2 Community License for Vicuna 1.5), the vision tower "
            "its own."
        )
        return OFFICIAL_LICENCE, text
    text = "* The language model and the vision tower keep the licences of the source"
    text += (
        f", which declares `{own}`." if own else "; it declares none here (LLaMA 2 Community License for Vicuna 1.5)."
    )
    return own or "other", text + "\n* The projector is derived from the source's and keeps its licence."


def _declared(folder: Path) -> str | None:
    card = folder / CARD_FILE
    try:
        found = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # somebody else's card is not ours to check, and yaml has many errors
        return None
    return found if isinstance(found, str) else None
