"""The three modules of LLaVA-STF on top of `reference.functional`.

Constructor arguments and state_dict keys equal those of `stf_kernels.modules`.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .functional import concat_linear, spatial_merge_linear


class MultiBlockTokenFusion(nn.Module):
    """MBTF: linear_2(act(linear_1(concat(blocks)))).   M blocks [B, T, C] -> [B, T - skip_tokens, out_dim]"""

    def __init__(
        self, num_blocks, dim, hidden_dim=None, out_dim=None, *, activation="gelu", bias=True, skip_tokens=0,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        out_dim = dim if out_dim is None else out_dim
        self.activation, self.skip_tokens = activation, skip_tokens
        self.linear_1 = nn.Linear(num_blocks * dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        hidden = concat_linear(
            blocks, self.linear_1.weight, self.linear_1.bias, activation=self.activation, skip_tokens=self.skip_tokens
        )
        return self.linear_2(hidden)


class SpatialTokenFusion(nn.Module):
    """STF: linear_2(act(linear_1(merge_rxr(x)))).   [B, H*W, C] -> [B, (H//r)*(W//r), out_dim]"""

    def __init__(
        self, dim, out_dim, *, merge_size=2, hidden_dim=None, activation="gelu", bias=True, truncate=False,
        feature_order="patch_major", device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden_dim = 4 * merge_size**2 * dim if hidden_dim is None else hidden_dim
        self.merge_size, self.activation = merge_size, activation
        self.truncate, self.feature_order = truncate, feature_order
        self.linear_1 = nn.Linear(merge_size**2 * dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        hidden = spatial_merge_linear(
            x, self.linear_1.weight, self.linear_1.bias, grid=_square(x.shape[1]) if grid is None else grid,
            merge_size=self.merge_size, activation=self.activation, feature_order=self.feature_order,
            truncate=self.truncate,
        )  # fmt: skip
        return self.linear_2(hidden)


class CompactTokenProjector(nn.Module):
    """The projector of LLaVA-STF: stf(mbtf(blocks)).   M blocks [B, T, C] -> [B, (H//r)*(W//r), out_dim]

    `mbtf=False` takes one block and is STF alone; `merge_size=1` is MBTF with a per-token projector.
    """

    def __init__(
        self, num_blocks, dim, out_dim, *, merge_size=2, skip_tokens=0, mbtf=True, mbtf_hidden_dim=None,
        stf_hidden_dim=None, activation="gelu", bias=True, truncate=False, feature_order="patch_major",
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if not mbtf and num_blocks != 1:
            raise ValueError(f"num_blocks: expected 1 with mbtf=False, got {num_blocks}")
        self.skip_tokens = skip_tokens
        factory = {"activation": activation, "bias": bias, "device": device, "dtype": dtype}
        self.mbtf = (
            MultiBlockTokenFusion(num_blocks, dim, mbtf_hidden_dim, skip_tokens=skip_tokens, **factory)
            if mbtf
            else None
        )
        self.stf = SpatialTokenFusion(
            dim, out_dim, merge_size=merge_size, hidden_dim=stf_hidden_dim, truncate=truncate,
            feature_order=feature_order, **factory,
        )  # fmt: skip

    def forward(
        self,
        blocks: Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        *,
        out: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """With out [R, out_dim] and rows [B*(H//r)*(W//r)] int64, token i goes to out[rows[i]]; returns out."""
        x = blocks[0][:, self.skip_tokens :] if self.mbtf is None else self.mbtf(blocks)
        z = self.stf(x, grid)
        if out is None:
            return z
        out[rows] = z.flatten(0, 1)
        return out


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"grid: {tokens} tokens are not a square; pass grid=(H, W)")
    return side, side
