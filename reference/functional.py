"""The two operators of LLaVA-STF (arXiv 2506.07138), written as the paper states them.

concat_linear          y = act(concat(blocks, -1) @ W^T + b)     Multi-Block Token Fusion
spatial_merge_linear   y = act(merge_rxr(x) @ W^T + b)           Spatial Token Fusion
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}

# The merged feature axis, c = channel, (dy, dx) = offset inside the window.
_MERGE_PATTERNS = {
    "patch_major": "b (h dy) (w dx) c -> b (h w) (dy dx c)",
    "channel_major": "b (h dy) (w dx) c -> b (h w) (c dy dx)",  # F.unfold, pixel_unshuffle
}


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Elementwise activation: None, "gelu" (erf), "gelu_tanh" or "silu"."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {list(_ACTIVATIONS)}, got {activation!r}")
    return _ACTIVATIONS[activation](x)


def spatial_merge(x: Tensor, grid: tuple[int, int], merge_size: int, feature_order: str, truncate: bool) -> Tensor:
    """[B, H*W, C] -> [B, (H//r)*(W//r), r*r*C]; rows and columns past the last window are cut with `truncate`."""
    if feature_order not in _MERGE_PATTERNS:
        raise ValueError(f"feature_order: expected one of {list(_MERGE_PATTERNS)}, got {feature_order!r}")
    height, width = grid
    if x.shape[1] != height * width:
        raise ValueError(f"grid: expected {height} * {width} tokens for {tuple(grid)}, got {x.shape[1]}")
    if (height % merge_size or width % merge_size) and not truncate:
        raise ValueError(
            f"grid: {tuple(grid)} is not divisible by merge_size={merge_size}; pass truncate=True to cut it"
        )
    x = rearrange(x, "b (h w) c -> b h w c", h=height, w=width)
    x = x[:, : height // merge_size * merge_size, : width // merge_size * merge_size]
    return rearrange(x, _MERGE_PATTERNS[feature_order], dy=merge_size, dx=merge_size)


def concat_linear(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    skip_tokens: int = 0,
) -> Tensor:
    """Concatenate M blocks [B, T, C] on the last axis, then linear and activation.

    weight [N, M*C], bias [N]  ->  [B, T - skip_tokens, N]
    """
    x = torch.cat([block[:, skip_tokens:] for block in blocks], dim=-1)
    return activate(F.linear(x, weight, bias), activation)


def spatial_merge_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    merge_size: int = 2,
    activation: str | None = None,
    skip_tokens: int = 0,
    feature_order: str = "patch_major",
    truncate: bool = False,
) -> Tensor:
    """Merge r x r neighbourhoods of a token grid into one token, then linear and activation.

    x [B, skip_tokens + H*W, C], weight [N, r*r*C], bias [N]  ->  [B, (H//r)*(W//r), N]
    """
    x = spatial_merge(x[:, skip_tokens:], grid, merge_size, feature_order, truncate)
    return activate(F.linear(x, weight, bias), activation)
