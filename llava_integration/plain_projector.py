"""The projector of LLaVA-STF in plain torch, for converted folders that are loaded where stf_kernels is not installed.

    u = act(concat(blocks) W1^T + b1)      v = u W2^T + b2            mbtf     M x [B, T, C] -> [B, H*W, C]
    h = act(merge_rxr(v) W3^T + b3)        z = h W4^T + b4            stf      [B, H*W, C] -> [B, (H//r)*(W//r), D]

The order within a window is patch-major, (dy*r + dx)*C + c. Names, arguments and state_dict keys are those of
stf_kernels.CompactTokenProjector, as far as `build_projector` uses them; nothing is checked that the configuration
has checked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


class TwoLayers(nn.Module):
    """linear_2(act(linear_1(x)))."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, activation: str, bias: bool, **factory):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=bias, **factory)
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class CompactTokenProjector(nn.Module):
    """stf(mbtf(blocks)): M blocks [B, skip_tokens + H*W, C] -> [B, (H//r)*(W//r), out_dim]."""

    def __init__(
        self,
        num_blocks: int,
        dim: int,
        out_dim: int,
        *,
        merge_size: int,
        skip_tokens: int,
        mbtf: bool,
        mbtf_hidden_dim: int,
        stf_hidden_dim: int,
        activation: str,
        bias: bool,
        truncate: bool,
        feature_order: str,
        **factory,
    ):
        super().__init__()
        if feature_order != "patch_major":
            raise ValueError(f"feature_order: expected 'patch_major', got {feature_order!r}")
        self.merge_size, self.skip_tokens = merge_size, skip_tokens
        self.mbtf = TwoLayers(num_blocks * dim, mbtf_hidden_dim, dim, activation, bias, **factory) if mbtf else None
        self.stf = TwoLayers(merge_size**2 * dim, stf_hidden_dim, out_dim, activation, bias, **factory)

    def forward(
        self,
        blocks: Sequence[Tensor],
        grid: tuple[int, int],
        *,
        out: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """With out [R, out_dim] and rows [B*(H//r)*(W//r)] int64, token i goes to out[rows[i]]; returns out."""
        x = torch.cat([block[:, self.skip_tokens :] for block in blocks], dim=-1)
        tokens = self.stf(merge(x if self.mbtf is None else self.mbtf(x), grid, self.merge_size))
        if out is None:
            return tokens
        out[rows] = tokens.flatten(0, 1)
        return out


def merge(x: Tensor, grid: tuple[int, int], r: int) -> Tensor:
    """[B, H*W, C] -> [B, (H//r)*(W//r), r*r*C], patch-major; rows and columns that fill no window are dropped."""
    height, width = (side // r for side in grid)
    x = x.unflatten(1, grid)[:, : height * r, : width * r]
    windows = x.unflatten(2, (width, r)).unflatten(1, (height, r)).transpose(2, 3)  # [B, h, w, r, r, C]
    return windows.flatten(3).flatten(1, 2)
