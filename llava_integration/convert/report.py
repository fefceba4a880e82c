"""What a conversion says: the one error, the report on every tensor, the model card of the new folder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import metadata_load
from transformers import PreTrainedConfig

KINDS = ("mapped", "relaid out", "merged", "resized", "created", "left over")
CARD_FILE = "README.md"
CONFIG = "SRC: config.json"
GET_AGAIN = "get the file again"


class ConversionError(ValueError):
    """In one line what was named, what was expected, what came, what to do. Nothing is at DST, SRC is as it was."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@contextlib.contextmanager
def blamed_on(what: str, remedy: str = GET_AGAIN) -> Iterator[None]:
    """Whatever is raised inside becomes a ConversionError about `what`: fields of a foreign file break anything."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ConversionError(f"{what}: expected valid values, got {got}; {remedy}") from error


@contextlib.contextmanager
def passed_on(prefix: str = "") -> Iterator[None]:
    """A refusal of llava_integration's own becomes a ConversionError with the same words behind `prefix`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{prefix}{error}") from error


@dataclass
class Report:
    """What `command` made of the checkpoint in `src`.

    Per kind, `tensors` holds lines such as "target <- source"; `warnings` say what a reader has to know or check.
    `form`: what kind of checkpoint it was; `tower`: the vision tower's name, empty if unknown.
    """

    command: str
    src: Path
    form: str
    tower: str = ""
    tensors: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        tensors = {kind: lines for kind, lines in self.tensors.items() if lines}
        return {"tensors": tensors, "notes": self.notes, "warnings": self.warnings}

    def lines(self) -> list[str]:
        """For a terminal; conversion.json names the tensors."""
        counts = [f"{kind:>10}: {len(lines)}" for kind, lines in self.tensors.items()]
        return counts + self.notes + [f"warning: {warning}" for warning in self.warnings]


CARD = Path(__file__).with_name("card.md")
PROCESSOR = '\nprocessor = AutoProcessor.from_pretrained("this folder")'
REMOTE = """
Or, without that import, with `trust_remote_code=True` in both calls: the code beside the weights takes the package
where it is installed, and plain torch where it is not.
"""


def model_card(config: PreTrainedConfig, report: Report, *, processor: bool, auto_map: bool) -> str:
    """README.md; folders appear by their names, never with a path. `processor`, `auto_map`: what is there."""
    counts = [f"* {kind}: {len(lines)}\n" for kind, lines in report.tensors.items() if lines]
    card = CARD.read_text(encoding="utf-8").format(
        **(_official if report.command == "official" else _warm_started)(report),
        name=_name(report.src),
        kind=config.model_type,
        tokens=config.image_seq_length,
        what="tile of an image" if hasattr(config, "image_grid_pinpoints") else "image",
        form=report.form + (f", vision tower {report.tower}" if report.tower else ""),
        command=report.command,
        layers=str(config.vision_feature_layer).strip("[]"),
        window=config.spatial_merge_size,
        order=config.feature_order,
        counts="".join(counts + [f"* warning: {line}\n" for line in report.warnings]),
        imported=", AutoProcessor" if processor else "",
        made=PROCESSOR if processor else "",
    )
    return card + (REMOTE if auto_map else "")


def _name(folder: Path) -> str:
    """The folder's name; in the hub's cache, models--OWNER--NAME/snapshots/COMMIT, OWNER/NAME at COMMIT."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')} at {folder.name}"
    return folder.name


def _official(report: Report) -> dict[str, str]:
    origin = ["The image token was given an id in the vocabulary."]
    if report.tensors["relaid out"]:
        origin.append(
            "`mm_projector.0.weight` was channel-major there (`c * r * r + dy * r + dx`) and was relaid out once."
        )
    if report.tensors["resized"]:
        origin.append("Rows up to a multiple of 64 were added to the embeddings, each the mean of the others.")
    licences = """* The weights of the official LLaVA-STF are under CC-BY-NC-4.0: no commercial use.
* The language model keeps its own licence (LLaMA 2 Community License for Vicuna 1.5), the vision tower its own."""
    return {"licence": "cc-by-nc-4.0", "licences": licences, "origin": " ".join(origin)}


def _warm_started(report: Report) -> dict[str, str]:
    own = _declared(report.src)
    declares = f", which declares `{own}`"
    if not own:
        declares = "; it declares none here (LLaMA 2 Community License for Vicuna 1.5)"
    licences = f"""* The language model and the vision tower keep the licences of the source{declares}.
* The projector is derived from the source's and keeps its licence."""
    origin = """The projector was made, not trained: its output is the average of the source's image tokens over each
window, exactly in real arithmetic. It is a starting point for fine-tuning."""
    return {"licence": own or "other", "licences": licences, "origin": origin}


def _declared(folder: Path) -> str | None:
    try:
        found = (metadata_load(folder / CARD_FILE) or {}).get("license")
    except Exception:  # no card, or a damaged one: it is not ours to check, and yaml has many errors
        return None
    return found if isinstance(found, str) else None
