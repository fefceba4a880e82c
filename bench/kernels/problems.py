"""The projector as four products, at LLaVA-1.5-7B sizes or small ones, with random data, and its eager form.

    concat          8 x [B, 577, C] -> [B, 576, 4C]      GELU       linear_1 of MBTF
    linear_merge    [B, 576, 4C]    -> [B, 576, C]                  linear_2 of MBTF; ours merges on store
    linear          [B, 576, C]     -> [B, 144, 16C]     GELU       linear_1 of STF; the eager form merges by a copy
    linear_scatter  [B, 144, 16C]   -> [B, 144, D]                  linear_2 of STF

The blocks carry a CLS token that no product reads: their rows are strided, as they come out of the tower.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stf_kernels

from ..roofline import Work, linear

PRODUCTS = ("concat", "linear_merge", "linear", "linear_scatter")


@dataclass(frozen=True)
class Sizes:
    """C channels of the tower, D of the language model, M blocks, a square grid."""

    dim: int = 1024
    out_dim: int = 4096
    blocks: int = 8
    side: int = 24
    merge: int = 2

    def work(self, stage: str, batch: int, item: int) -> Work:
        c, window, tokens = self.dim, self.merge**2 * self.dim, batch * self.side**2
        merged = tokens // self.merge**2
        rows, inner, columns = {
            "concat": (tokens, self.blocks * c, 4 * c),
            "linear_merge": (tokens, 4 * c, c),
            "linear": (merged, window, 4 * window),
            "linear_scatter": (merged, 4 * window, self.out_dim),
        }[stage]
        return linear(rows, inner, columns, item)


LLAVA = Sizes()
# Odd: every tail mask of the kernels is used, and an access past the end of an operand is one out of bounds.
SMALL = Sizes(dim=40, out_dim=72, blocks=3, side=6)


def merge(x: Tensor, sizes: Sizes) -> Tensor:
    """[B, H*W, C] -> [B, (H/r)*(W/r), r*r*C], patch-major: the copy that the eager form pays for."""
    side, r = sizes.side // sizes.merge, sizes.merge
    windows = x.view(x.shape[0], side, r, side, r, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return windows.reshape(x.shape[0], side * side, -1)


def flat(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """An output as it is, gradients in one row."""
    return found if isinstance(found, Tensor) else torch.cat([gradient.flatten() for gradient in found])


def reference_projector(fused: nn.Module) -> nn.Module:
    """reference.CompactTokenProjector on the very parameters of `fused` (no copy)."""
    import reference

    mbtf, stf = fused.mbtf, fused.stf
    widths = {"mbtf_hidden_dim": mbtf.linear_1.out_features, "stf_hidden_dim": stf.linear_1.out_features}
    options = {"skip_tokens": fused.skip_tokens, "merge_size": stf.merge_size, "device": "meta"}
    module = reference.CompactTokenProjector(fused.num_blocks, fused.dim, fused.out_dim, **widths, **options)
    module.load_state_dict(dict(fused.named_parameters()), assign=True)
    return module.train(fused.training)


class Operands:
    """Parameters, and inputs of every product at one batch size: each reads the eager output of the one before.

    Hidden states of unit variance, and weights that keep the variance of their input near one.
    """

    @torch.no_grad()
    def __init__(self, sizes: Sizes, batch: int, *, device: str, dtype: torch.dtype) -> None:
        draw = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(1))
        self.sizes, (m, c, d) = sizes, (sizes.blocks, sizes.dim, sizes.out_dim)
        options = {"merge_size": sizes.merge, "skip_tokens": 1, "device": device, "dtype": dtype}
        self.projector = stf_kernels.CompactTokenProjector(m, c, d, **options).requires_grad_(False)
        for parameter in self.projector.parameters():
            parameter.copy_(draw(parameter.shape) * (parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.1))
        self.blocks = x = [draw(batch, 1 + sizes.side**2, c).to(dtype) for _ in range(m)]
        layers = [layer for child in self.projector.children() for layer in (child.linear_1, child.linear_2)]
        self.parameters = {name: (layer.weight, layer.bias) for name, layer in zip(PRODUCTS, layers, strict=True)}
        self.inputs: dict[str, Any] = {"chain": x}
        self.upstream: Tensor | None = None
        for stage in PRODUCTS:
            self.inputs[stage] = x
            x = self.eager(stage, x)

    def eager(self, stage: str, x: Any) -> Tensor:
        """A product, or the chain of them, in plain PyTorch, as one would write it."""
        if stage == "chain":
            for one in PRODUCTS:
                x = self.eager(one, x)
            return x
        w, b = self.parameters[stage]
        if stage == "concat":
            return F.gelu(F.linear(torch.cat([block[:, 1:] for block in x], dim=-1), w, b))
        return F.gelu(F.linear(merge(x, self.sizes), w, b)) if stage == "linear" else F.linear(x, w, b)

    def exact(self, stage: str, *, gradients: bool = False) -> Tensor:
        """In float64, from the operands as they are."""
        wide, x = copy.copy(self), self.inputs[stage]
        wide.upstream = None
        wide.parameters = {s: [p.detach().double().requires_grad_() for p in self.parameters[s]] for s in PRODUCTS}
        x = [block.double() for block in x] if isinstance(x, list) else x.double()
        return flat(wide.gradients(lambda: wide.eager(stage, x))) if gradients else wide.eager(stage, x).detach()

    def gradients(self, forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """Of the chain's parameters, for an upstream gradient of unit variance: the tower is frozen."""
        y = forward()
        if self.upstream is None:  # once: it is no part of what is timed, and a capture forbids to draw
            draw = torch.Generator(y.device).manual_seed(7)
            upstream = torch.randn(y.shape, device=y.device, generator=draw)
            self.upstream = upstream.to(self.blocks[0].dtype).to(y.dtype)
        leaves = [parameter for pair in self.parameters.values() for parameter in pair]
        return torch.autograd.grad(y, leaves, self.upstream)
