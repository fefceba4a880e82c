"""The projector as four GEMMs, at LLaVA-1.5-7B sizes or small ones, with random data, and its eager form.

    G1  concat  8 x [B, 577, C] -> [B, 576, 4C]      GELU       linear_1 of MBTF
    G2  linear  [B, 576, 4C]    -> [B, 576, C]                  linear_2 of MBTF
    G3  merge   [B, 576, C]     -> [B, 144, 16C]     GELU       linear_1 of STF
    G4  linear  [B, 144, 16C]   -> [B, 144, D]                  linear_2 of STF

The blocks carry a CLS token that no stage reads: their rows are strided, as they come out of the tower.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ("G1", "G2", "G3", "G4")


@dataclass(frozen=True)
class Sizes:
    """C channels of the tower, D of the language model, M blocks, a square grid."""

    dim: int = 1024
    out_dim: int = 4096
    blocks: int = 8
    grid: int = 24
    merge: int = 2

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def merged(self) -> int:
        return (self.grid // self.merge) ** 2

    def gemm(self, stage: str, batch: int) -> tuple[int, int, int]:
        """(rows, columns, inner) of a stage."""
        c, hidden, window = self.dim, 4 * self.dim, self.merge**2 * self.dim
        return {
            "G1": (batch * self.tokens, hidden, self.blocks * c),
            "G2": (batch * self.tokens, c, hidden),
            "G3": (batch * self.merged, 4 * window, window),
            "G4": (batch * self.merged, self.out_dim, 4 * window),
        }[stage]

    def flops(self, stage: str, batch: int) -> int:
        m, n, k = self.gemm(stage, batch)
        return 2 * m * n * k

    def bytes(self, stage: str, batch: int, item: int) -> int:
        """The least a stage can move: its operands and its result, each once."""
        m, n, k = self.gemm(stage, batch)
        return item * (m * k + n * k + m * n)

    def copied_bytes(self, batch: int, item: int) -> int:
        """The concatenation and the unfolded copy, which the eager form makes and a fused chain does not."""
        return item * batch * (self.tokens * self.blocks * self.dim + self.merged * self.merge**2 * self.dim)

    def chain_bytes(self, batch: int, item: int) -> int:
        """The least the whole projector can move: the blocks and weights in, the tokens out, nothing between."""
        weights = sum(n * k for _, n, k in (self.gemm(stage, 1) for stage in STAGES))
        return item * (batch * self.tokens * self.blocks * self.dim + weights + batch * self.merged * self.out_dim)


LLAVA = Sizes()
SMALL = Sizes(dim=64, out_dim=128, grid=12)


def random_blocks(sizes: Sizes, batch: int, *, device: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """M hidden states [B, 1 + tokens, C] of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, 1 + sizes.tokens, sizes.dim)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(sizes.blocks)]


def build_projector(sizes: Sizes, module: Callable[..., nn.Module], *, device: str, dtype: torch.dtype, seed: int):
    """A CompactTokenProjector of `module` whose weights keep the variance of their input near one."""
    projector = module(
        sizes.blocks, sizes.dim, sizes.out_dim, merge_size=sizes.merge, skip_tokens=1, device=device, dtype=dtype
    )
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in projector.parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.1
            draws = torch.randn(parameter.shape, device=device, generator=generator)
            parameter.copy_(draws * scale)
    return projector


def merge(x: Tensor, sizes: Sizes) -> Tensor:
    """[B, H*W, C] -> [B, (H/r)*(W/r), r*r*C], patch-major: the copy that the eager form pays for."""
    side, r = sizes.grid // sizes.merge, sizes.merge
    windows = x.view(x.shape[0], side, r, side, r, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return windows.reshape(x.shape[0], side * side, -1)


def eager_stage(stage: str, x: list[Tensor] | Tensor, weight: Tensor, bias: Tensor, sizes: Sizes) -> Tensor:
    """A stage in plain PyTorch, as one would write it."""
    if stage == "G1":
        return F.gelu(F.linear(torch.cat([block[:, 1:] for block in x], dim=-1), weight, bias))
    if stage == "G3":
        return F.gelu(F.linear(merge(x, sizes), weight, bias))
    return F.linear(x, weight, bias)


def eager_chain(blocks: list[Tensor], parameters: dict[str, tuple[Tensor, Tensor]], sizes: Sizes) -> Tensor:
    x: list[Tensor] | Tensor = blocks
    for stage in STAGES:
        x = eager_stage(stage, x, *parameters[stage], sizes)
    return x


def can_compile(device: str) -> bool:
    """Whether torch.compile can build the kernels of an eager form: on a CPU they are C++."""
    return device.startswith("cuda") or any(map(shutil.which, ("c++", "g++", "clang++")))


def stage_parameters(projector: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    layers = (projector.mbtf.linear_1, projector.mbtf.linear_2, projector.stf.linear_1, projector.stf.linear_2)
    return {stage: (layer.weight, layer.bias) for stage, layer in zip(STAGES, layers, strict=True)}
