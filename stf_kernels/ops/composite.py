"""A chain in differentiable torch operations, for torch.func's transforms and forward-mode differentiation.

    stage:  y = act(gather(cat(blocks, -1)) @ W^T + b), its rows merged where the stage writes the merged layout

Per-sample gradients, Jacobians and Hessians come from torch's own rules; what the fused path saves is not saved here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .stage import split_windows

_ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def composite(plan, blocks: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The chain's output; biases may be empty."""
    stages, skip = plan
    x = torch.cat([block[:, skip:] for block in blocks], -1)
    for stage, weight, bias in zip(stages, weights, biases or [None] * len(weights), strict=True):
        if stage.gather > 1:
            x = _merged(x, stage.grid, stage.gather)
        x = _ACTIVATIONS[stage.activation](F.linear(x, weight, bias))
        if stage.scatter > 1:
            x = _merged(x, stage.grid, stage.scatter)
    return x


def _merged(x: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """[B, H*W, N] -> [B, (H//r)*(W//r), r*r*N], patch-major."""
    return split_windows(x, grid, size).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
