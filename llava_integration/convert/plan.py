"""Every tensor of the model gets exactly one source, or the conversion stops before it writes anything."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import Entries, Entry
from .errors import ConversionError
from .report import Report

SHOWN = 3


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `model` needs on disk; a head tied to the embeddings is not among them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if isinstance(model, PreTrainedModel) and model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` returns, with shapes and no values."""
    with torch.device("meta"):
        return build()


def rename(entries: Entries, name_of: Callable[[str], str | None]) -> tuple[Entries, dict[str, str]]:
    """Entries under the model's names, and the source name of each; names without one stay as they are."""
    renamed: Entries = {}
    sources: dict[str, str] = {}
    for name, entry in entries.items():
        target = name_of(name) or name
        if target in renamed:
            raise ConversionError(
                f"SRC: {name} and {sources[target]} are both {target}; remove one from the checkpoint"
            )
        renamed[target], sources[target] = entry, name
    return renamed, sources


def match(
    wanted: Mapping[str, tuple[int, ...]],
    entries: Entries,
    sources: Mapping[str, str],
    ignored: Callable[[str], str | None],
    report: Report,
) -> dict[str, Entry]:
    """One entry of the right shape for every name in `wanted`; only what `ignored` gives a reason for may be left over.

    `sources`: the checkpoint's own name of an entry, for messages and the report.
    """
    missing = [name for name in wanted if name not in entries]
    left = [name for name in entries if name not in wanted and ignored(name) is None]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if left:
        problems.append(f"{len(left)} tensors are left over: {_some(sources.get(name, name) for name in left)}")
    if problems:
        raise ConversionError(
            f"SRC: {'; '.join(problems)}; expected exactly the {len(wanted)} of the model that config.json describes: "
            "complete the checkpoint, or it is of another kind"
        )
    for name, shape in wanted.items():
        entry = entries[name]
        if entry.shape != shape:
            raise ConversionError(
                f"SRC: {sources.get(name, name)} in {entry.origin}: expected shape {list(shape)} by the configuration, "
                f"got {list(entry.shape)}"
            )
        if entry.dtype is None:
            raise ConversionError(
                f"SRC: {sources.get(name, name)} in {entry.origin}: expected float32, float16 or bfloat16, got another "
                "dtype; convert a checkpoint that is not quantized"
            )
    for name in wanted:
        report.add(entries[name].how, f"{name} <- {sources.get(name, name)}")
    for name in entries:
        if name not in wanted:
            report.add("left over", f"{sources.get(name, name)}: {ignored(name)}")
    return {name: entries[name] for name in wanted}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
