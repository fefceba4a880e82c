"""A head that config.json ties to the embeddings: as in transformers, what the checkpoint holds decides.

embeddings alone, or both and equal    tied
head alone                             tied, and the head is the embeddings: safetensors keeps the first name
both and different                     two tensors, whatever config.json says
"""

import torch

from .checkpoint import Entries, Entry
from .report import Report
from .vocabulary import EMBEDDINGS, HEAD


def settle(entries: Entries, sources: dict[str, str], tied: bool, report: Report) -> bool:
    """Whether the model is tied that config.json calls `tied`; a head alone becomes the embeddings, in place."""
    if not tied or HEAD not in entries:
        return tied
    if EMBEDDINGS not in entries:
        entries[EMBEDDINGS], sources[EMBEDDINGS] = entries.pop(HEAD), sources.pop(HEAD)
        return True
    if _equal(entries[HEAD], entries[EMBEDDINGS]):
        return True
    report.notes.append("config.json ties the head to the embeddings, but both are there and differ: kept apart")
    return False


def _equal(one: Entry, other: Entry) -> bool:
    return one.shape == other.shape and torch.equal(one.read(), other.read().to(one.dtype))
