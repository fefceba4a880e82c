"""The two operators as functions of flat operands, ours and the reference's, for `compare_functions`."""

from collections.abc import Callable

import torch
from torch import Tensor

import reference
import stf_kernels

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")


def concat_pair(count: int, crop: int = 0, **options) -> tuple[Callable, Callable]:
    """(ours, reference) of (weight, bias, *blocks); crop: leading tokens cut by a view, as `hidden_state[:, 1:]`."""

    def run(package):
        def call(weight, bias, *blocks):
            assert len(blocks) == count
            return package.concat_linear([block[:, crop:] for block in blocks], weight, bias, **options)

        return call

    return run(stf_kernels), run(reference)


def concat_operands(count, batch, tokens, channels, n, *, bias=True, device="cpu") -> list[Tensor | None]:
    """weight, bias and blocks; the sum over K has variance one."""
    k = count * channels
    weight = torch.randn(n, k, device=device) / k**0.5
    blocks = [torch.randn(batch, tokens, channels, device=device) for _ in range(count)]
    return [weight, torch.randn(n, device=device) if bias else None, *blocks]


def merge_pair(crop: int = 0, **options) -> tuple[Callable, Callable]:
    """(ours, reference) of (weight, bias, x)."""

    def run(package):
        return lambda weight, bias, x: package.spatial_merge_linear(x[:, crop:], weight, bias, **options)

    return run(stf_kernels), run(reference)


def merge_operands(batch, tokens, channels, n, merge_size, *, bias=True, device="cpu") -> list[Tensor | None]:
    k = merge_size**2 * channels
    weight = torch.randn(n, k, device=device) / k**0.5
    return [
        weight,
        torch.randn(n, device=device) if bias else None,
        torch.randn(batch, tokens, channels, device=device),
    ]
