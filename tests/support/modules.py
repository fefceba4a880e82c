"""The three modules: CASES of their options, by name, for every path and device; and one size for most other tests."""

import pytest
import torch
from torch import Tensor, nn

import stf_kernels

from .compare import compare_modules, twins

ARGUMENTS = {"MultiBlockTokenFusion": (3, 8), "SpatialTokenFusion": (8, 20), "CompactTokenProjector": (3, 8, 20)}
EACH_MODULE = pytest.mark.parametrize("name", ARGUMENTS)
FUSION, MERGING, PROJECTOR = ARGUMENTS

# module, arguments, grid, options
CASES = {
    "mbtf": (FUSION, (3, 16), (3, 4), {}),
    "mbtf-widths": (FUSION, (2, 10, 30, 17), (3, 4), {}),
    "mbtf-no-bias-silu": (FUSION, (4, 8), (3, 4), {"bias": False, "activation": "silu"}),
    "mbtf-one-block-skip": (FUSION, (1, 16), (3, 4), {"skip_tokens": 1}),
    "mbtf-linear": (FUSION, (2, 16), (3, 4), {"activation": None}),
    "stf": (MERGING, (8, 24), (4, 4), {}),
    "stf-r3-tall": (MERGING, (6, 20), (6, 3), {"merge_size": 3, "hidden_dim": 40}),
    "stf-truncated": (MERGING, (8, 24), (4, 7), {"truncate": True, "activation": "gelu_tanh"}),
    "projector": (PROJECTOR, (3, 8, 20), (4, 4), {}),
    "class-token": (PROJECTOR, (4, 17, 20), (4, 6), {"skip_tokens": 1}),
    "truncated": (PROJECTOR, (2, 8, 20), (5, 7), {"truncate": True, "skip_tokens": 1, "activation": "silu"}),
    "r3-no-bias-silu": (PROJECTOR, (2, 6, 20), (3, 6), {"merge_size": 3, "bias": False, "activation": "silu"}),
    "r1-tanh": (PROJECTOR, (3, 8, 20), (3, 5), {"merge_size": 1, "activation": "gelu_tanh"}),
    "linear": (PROJECTOR, (3, 8, 20), (4, 6), {"activation": None}),
    "r4": (PROJECTOR, (3, 17, 20), (4, 8), {"merge_size": 4, "stf_hidden_dim": 40}),
    "stf-alone": (PROJECTOR, (1, 8, 20), (4, 4), {"mbtf": False, "skip_tokens": 1}),
    "widths": (PROJECTOR, (3, 8, 20), (4, 4), {"mbtf_hidden_dim": 33, "stf_hidden_dim": 37}),
    "thirty-two-blocks": (PROJECTOR, (32, 4, 20), (2, 4), {}),
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def compare_case(case: tuple, dtype: torch.dtype, batch: int = 2) -> None:
    """Ours against the reference, gradients of every block and parameter too."""
    name, args, grid, options = case
    count, dim = (1, args[0]) if name == MERGING else args[:2]
    tokens = grid[0] * grid[1] + options.get("skip_tokens", 0)

    def call(module, blocks):
        if name == FUSION:
            return module(blocks)
        return module(blocks[0] if name == MERGING else blocks, grid)

    blocks = [torch.randn(batch, tokens, dim) for _ in range(count)]
    compare_modules(twins(name, *args, **options, dtype=dtype), blocks, dtype, call, gradients=True)


def build(name: str, **options) -> nn.Module:
    return getattr(stf_kernels, name)(*ARGUMENTS[name], **options)


def draw(name: str, batch: int = 2, tokens: int = 16, **options) -> list[Tensor] | Tensor:
    """Three blocks, or the tokens of a SpatialTokenFusion."""
    blocks = [torch.randn(batch, tokens, 8, **options) for _ in range(3)]
    return blocks[0] if name == "SpatialTokenFusion" else blocks


def flat(x: list[Tensor] | Tensor) -> list[Tensor]:
    return x if isinstance(x, list) else [x]
