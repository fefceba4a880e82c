"""What a conversion says: the one error, the report on every tensor, the model card of the new folder."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import metadata_load
from jinja2 import Template
from transformers import PreTrainedConfig

from stf_kernels.command import BadInput

KINDS = ("mapped", "relaid out", "merged", "resized", "created", "left over")
CARD_FILE = "README.md"
CONFIG = "SRC: config.json"


class ConversionError(BadInput):
    """In one line what was named, what was expected, what came, what to do. Nothing is at DST, SRC is as it was."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@contextlib.contextmanager
def blamed_on(what: str, remedy: str = "get the file again") -> Iterator[None]:
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

    def lines(self) -> list[str]:
        """For a terminal; conversion.json names the tensors."""
        counts = [f"{kind:>10}: {len(lines)}" for kind, lines in self.tensors.items()]
        return counts + self.notes + [f"warning: {warning}" for warning in self.warnings]


def model_card(config: PreTrainedConfig, report: Report, **there: bool) -> str:
    """README.md; folders appear by their names, never with a path. `there`: processor, auto_map."""
    template = Template(Path(__file__).with_name("card.jinja").read_text(encoding="utf-8"))
    try:
        licence = (metadata_load(report.src / CARD_FILE) or {}).get("license")
    except Exception:  # no card, or a damaged one: it is not ours to check, and yaml has many errors
        licence = None
    licence = licence if isinstance(licence, str) else None
    folder = report.src.resolve()
    name, repository = folder.name, folder.parent.parent.name
    if repository.startswith("models--"):  # the hub's cache
        name = f"{repository.removeprefix('models--').replace('--', '/')} at {folder.name}"
    return template.render(config=config, report=report, name=name, licence=licence, **there)
