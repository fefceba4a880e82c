"""Outputs that should agree, compared before any speed-up is reported: ||a - b|| / ||b|| in float64.

    reference against fused     the same projector on the same parameters: image features, logits and first token
    warm start against pooled   LLaVA-STF fresh from `from_llava` is the 2x2 mean of the stock projector's tokens
    skip against stock          the tower without its unread layer: image features and logits
    a mode against eager        a row captured or compiled against its own eager run

Image features are read where they end: in the rows of inputs_embeds that the language model gets. So insertion is
compared too, and a captured prefill, whose logits alone would hide a small error behind a whole language model.

The bounds are a few roundings of the dtype: both sides round every intermediate once. tf32 (3e-4) exceeds fp32's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

FEATURES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# The same across modes, whose towers may run other kernels: two of attention lie 1.3e-2 apart in bf16 behind 24 layers.
ACROSS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Logits are behind a whole language model, whose every layer amplifies a difference of its inputs.
LOGITS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 4e-2, torch.bfloat16: 2e-1}


@dataclass
class Check:
    """One comparison: `error` must not exceed `bound`."""

    name: str
    error: float | None  # None: not finite
    bound: float

    @property
    def agrees(self) -> bool:
        return self.error is not None and self.error <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "agrees": self.agrees}

    def __str__(self) -> str:
        error = "not finite" if self.error is None else f"{self.error:.1e}"
        return f"{self.name}: relative difference {error}, allowed {self.bound:.0e}"


def compare(name: str, ours: Tensor, theirs: Tensor, bounds: dict[torch.dtype, float]) -> Check:
    """`bounds` is FEATURES or LOGITS; different shapes and values that are not finite never agree."""
    bound = bounds[theirs.dtype]
    if ours.shape != theirs.shape:
        return Check(f"{name} (shapes {list(ours.shape)} and {list(theirs.shape)})", None, bound)
    error = relative_error(ours, theirs)
    return Check(name, error if error == error and error != float("inf") else None, bound)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-300))
