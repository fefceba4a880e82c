"""The two operators as functions of flat operands, ours and the reference's, for `compare_functions`; their shapes, and
strides that operands may have."""

from collections.abc import Callable

import torch
from torch import Tensor

import reference
import stf_kernels

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")
# blocks, batch, tokens, channels, N, bias; they stand around 32 x 32 x 32, the tile of the interpreter
SHAPES = {
    "one-tile": (2, 1, 32, 32, 32, True),
    "tails-of-all": (3, 1, 33, 33, 33, True),
    "below-a-tile": (3, 2, 5, 7, 9, False),
    "columns-one-short": (2, 1, 31, 31, 63, True),
    "one-block": (1, 2, 20, 40, 40, True),
    "thirty-two-blocks": (32, 1, 4, 8, 40, True),
    "one-token": (4, 1, 1, 16, 48, True),
    "one-channel": (5, 1, 40, 1, 20, False),
    "one-output": (3, 4, 50, 16, 1, True),
    "many-images": (2, 40, 1, 16, 16, True),
    "rows-of-tiles": (1, 1, 130, 16, 70, True),  # more tile rows than group_m
    "no-images": (3, 0, 5, 8, 12, True),
    "no-tokens": (3, 2, 0, 8, 12, True),
}
# merge size, grid
GRIDS = {
    "r1": (1, (3, 5)),
    "square": (2, (4, 4)),
    "wide": (2, (2, 34)),
    "tall": (2, (6, 4)),
    "r3": (3, (6, 3)),
    "r4": (4, (4, 8)),
    "one-window": (3, (3, 3)),
    "one-token": (1, (1, 1)),
    # tokens of no window are left out, and get a gradient of zero
    "last-column": (2, (4, 5)),
    "last-row": (2, (5, 4)),
    "last-of-both": (2, (5, 7)),
    "r3-last-of-both": (3, (5, 4)),
    "r4-last-row": (4, (9, 8)),
    "nothing-left": (2, (1, 4)),
}


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


def transposed(x):
    """The same values, last axis not contiguous."""
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


def interleaved(x):
    """The same values as every other token of something longer, or row of a weight."""
    return torch.stack([x, torch.full_like(x, 1e4)], -2).flatten(-3, -2)[..., ::2, :]


def batch_inner(x):
    """The same values, the batch axis inside the token axis."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def later_columns(weight):
    return torch.cat([torch.full_like(weight, 1e4), weight], 1)[:, weight.shape[1] :]


def every_other(bias):
    return torch.stack([bias, torch.full_like(bias, 1e4)], 1).flatten()[::2]


def shifted(x):
    """The same values and strides, one element off a boundary of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = (transposed, interleaved, batch_inner)
# what (weight, bias, *three blocks) become
CHANGES = {
    "blocks-transposed": lambda w, b, *blocks: (w, b, *map(transposed, blocks)),
    "blocks-interleaved": lambda w, b, *blocks: (w, b, *map(interleaved, blocks)),
    "blocks-batch-inner": lambda w, b, *blocks: (w, b, *map(batch_inner, blocks)),
    "each-block-another": lambda w, b, x, y, z: (w, b, x, transposed(y), interleaved(z)),
    "unaligned-and-another": lambda w, b, x, y, z: (w, b, x, shifted(y), batch_inner(z)),
    "one-block-thrice": lambda w, b, x, *_: (w, b, x, x, x),
    "blocks-expanded": lambda w, b, *blocks: (w, b, *(block[:1].expand(4, -1, -1) for block in blocks)),
    "weight-rows": lambda w, *rest: (interleaved(w), *rest),
    "weight-columns": lambda w, *rest: (later_columns(w), *rest),
    "weight-transposed": lambda w, *rest: (transposed(w), *rest),
    "bias-every-other": lambda w, b, *blocks: (w, every_other(b), *blocks),
    "bias-expanded": lambda w, b, *blocks: (w, b[:1].expand(len(b)), *blocks),
}


def changed(pair, change):
    """(ours, reference) of the operands as they are before the change: gradients are compared in their layout."""
    return [lambda *operands, run=run: run(*change(*operands)) for run in pair]
