"""The three modules at the sizes of most tests, ours or the reference's, and what their forward takes."""

import pytest
import torch
from torch import Tensor, nn

import reference
import stf_kernels

ARGUMENTS = {"MultiBlockTokenFusion": (3, 8), "SpatialTokenFusion": (8, 20), "CompactTokenProjector": (3, 8, 20)}
EACH_MODULE = pytest.mark.parametrize("name", ARGUMENTS)


def build(name: str, package=stf_kernels, **options) -> nn.Module:
    return getattr(package, name)(*ARGUMENTS[name], **options)


def draw(name: str, batch: int = 2, tokens: int = 16, **options) -> list[Tensor] | Tensor:
    """Three blocks, or the tokens of a SpatialTokenFusion."""
    blocks = [torch.randn(batch, tokens, 8, **options) for _ in range(3)]
    return blocks[0] if name == "SpatialTokenFusion" else blocks


def flat(x: list[Tensor] | Tensor) -> list[Tensor]:
    return x if isinstance(x, list) else [x]


def same_state(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """(ours, the reference) with the same parameters."""
    ours, theirs = build(name, **options), build(name, reference, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
