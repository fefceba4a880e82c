"""The projector in plain torch, for converted folders that are loaded where stf_kernels is not installed.

Only with STF_KERNELS_HUB=OWNER/NAME or OWNER/NAME@VERSION a build of stf_kernels on the kernels hub takes its place.

    u = act(concat(blocks) W1^T + b1)      v = u W2^T + b2            mbtf     M x [B, T, C] -> [B, H*W, C]
    h = act(merge_rxr(v) W3^T + b3)        z = h W4^T + b4            stf      [B, H*W, C] -> [B, (H//r)*(W//r), D]

Names, arguments and state_dict keys are those of stf_kernels.CompactTokenProjector, as far as a model uses them, and
weights are patch-major, (dy*r + dx)*C + c; nothing is checked that the configuration has checked.
"""

import os
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


class TwoLayers(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, activation: str, **options):
        super().__init__()
        self.activation = activation
        self.linear_1 = nn.Linear(in_dim, hidden_dim, **options)
        self.linear_2 = nn.Linear(hidden_dim, out_dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


class CompactTokenProjector(nn.Module):
    """stf(mbtf(blocks)): M blocks [B, skip_tokens + H*W, C] -> [B, (H//r)*(W//r), out_dim]."""

    kernel_layer_name = "CompactTokenProjector"  # by which `kernels.kernelize` finds it

    def __init__(self, num_blocks, dim, out_dim, *, merge_size, skip_tokens, mbtf, truncate, **sizes):
        super().__init__()
        self.skip_tokens = skip_tokens
        widths = sizes.pop("mbtf_hidden_dim"), sizes.pop("stf_hidden_dim")
        self.mbtf = TwoLayers(num_blocks * dim, widths[0], dim, **sizes) if mbtf else None
        self.stf = TwoLayers(merge_size**2 * dim, widths[1], out_dim, **sizes)
        self.stf.merge_size, self.stf.truncate = merge_size, truncate

    def forward(self, blocks, grid: tuple[int, int], *, out: Tensor | None = None, rows: Tensor | None = None):
        """With out [R, out_dim] and rows [B*(H//r)*(W//r)] int64, token i goes to out[rows[i]]; returns out."""
        x = torch.cat([block[:, self.skip_tokens :] for block in blocks], dim=-1)
        tokens = self.stf(merge(x if self.mbtf is None else self.mbtf(x), grid, self.stf.merge_size))
        if out is None:
            return tokens
        out[rows] = tokens.flatten(0, 1)
        return out


def merge(x: Tensor, grid: tuple[int, int], r: int) -> Tensor:
    """[B, H*W, C] -> [B, (H//r)*(W//r), r*r*C]; rows and columns that fill no window are dropped."""
    height, width = (side // r for side in grid)
    x = x.unflatten(1, grid)[:, : height * r, : width * r]
    windows = x.unflatten(2, (width, r)).unflatten(1, (height, r)).transpose(2, 3)  # [B, h, w, r, r, C]
    return windows.flatten(3).flatten(1, 2)


def hub_or_plain(*sizes, **options) -> nn.Module:
    """The fused projector of the build that STF_KERNELS_HUB names, if it names one; ImportError without `kernels`."""
    repository, _, version = os.environ.get("STF_KERNELS_HUB", "").partition("@")
    if not repository:
        return CompactTokenProjector(*sizes, **options)
    kernels = import_module("kernels")  # a statement would make transformers ask for it of everybody
    kernel = kernels.get_kernel(repository, version=int(version or 1), trust_remote_code=[repository])
    return kernel.CompactTokenProjector(*sizes, **options)
