"""Tensors that older checkpoints stored and the model computes: the only ones that may be left over."""

import re

COMPUTED = {
    re.compile(r"\.rotary_emb\.inv_freq$"): "computed from the configuration",
    re.compile(r"\.embeddings\.position_ids$"): "computed from the configuration",
    re.compile(r"^lm_head\.weight$"): "tied to the embeddings",
}


def computed(name: str) -> str | None:
    """Why `name` is not needed; None when it must not be there. Asked only for names that the model does not want."""
    return next((reason for pattern, reason in COMPUTED.items() if pattern.search(name)), None)
