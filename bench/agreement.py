"""Outputs that should agree, compared before any speed-up is reported: ||a - b|| / ||b|| in float64.

The bounds are a few roundings of the dtype: both sides round every intermediate once. tf32 (3e-4) exceeds fp32's.
"""

import math
from typing import Any

import torch
from torch import Tensor

FEATURES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# The same across modes, whose towers may run other kernels: two of attention lie 1.3e-2 apart in bf16 behind 24 layers.
ACROSS = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Logits are behind a whole language model, whose every layer amplifies a difference of its inputs.
LOGITS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 4e-2, torch.bfloat16: 2e-1}


def compare(name: str, ours: Tensor, theirs: Tensor, bounds: dict[torch.dtype, float]) -> dict[str, Any]:
    """A check of prefill.json; different shapes and values that are not finite never agree."""
    bound, error = bounds[theirs.dtype], math.nan
    if ours.shape == theirs.shape:
        error = relative_error(ours, theirs)
    else:
        name = f"{name} (shapes {list(ours.shape)} and {list(theirs.shape)})"
    finite = error if math.isfinite(error) else None
    return {"name": name, "error": finite, "bound": bound, "agrees": error <= bound}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-300))
