"""Calls of the two operators at sizes, strides and options of every kind: CASES, by name, for every path and device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from .compare import compare_functions

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")


class Case(NamedTuple):
    """call(package, weight, bias, *blocks) -> y, of stf_kernels or of the reference, on operands of these shapes."""

    call: Callable[..., Tensor]
    shapes: list[tuple[int, ...] | None]

    def compare(self, dtype: torch.dtype, device: str = "cpu") -> None:
        """Ours against the reference, gradients too; the sums over K have variance one."""
        weight, *others = [None if shape is None else torch.randn(shape, device=device) for shape in self.shapes]
        y = compare_functions(self.call, [weight / weight.shape[1] ** 0.5, *others], dtype)
        assert y.is_contiguous()


def concat(
    count: int,
    batch: int,
    tokens: int,
    c: int,
    n: int,
    bias: bool = True,
    *,
    crop: int = 0,
    change=None,
    **options: Any,
) -> Case:
    """crop: leading tokens cut by a view, as `hidden_state[:, 1:]`; change: of (weight, bias, *blocks), see CHANGES."""

    def call(package, *operands):
        weight, bias, *blocks = change(*operands) if change else operands
        return package.concat_linear([block[:, crop:] for block in blocks], weight, bias, **options)

    return Case(call, [(n, count * c), (n,) if bias else None, *[(batch, tokens, c)] * count])


def merge(
    batch: int,
    grid: tuple[int, int],
    c: int,
    n: int,
    merge_size: int = 2,
    *,
    crop: int = 0,
    layout=None,
    **options: Any,
) -> Case:
    """Before the grid are the tokens that `crop` and the option skip_tokens leave out."""
    tokens = crop + options.get("skip_tokens", 0) + grid[0] * grid[1]
    options |= {"grid": grid, "merge_size": merge_size, "truncate": True}

    def call(package, weight, bias, x):
        return package.spatial_merge_linear((layout(x) if layout else x)[:, crop:], weight, bias, **options)

    return Case(call, [(n, merge_size**2 * c), (n,), (batch, tokens, c)])


def transposed(x: Tensor) -> Tensor:
    """The same values, last axis not contiguous."""
    return x.mT.contiguous().mT


def interleaved(x: Tensor) -> Tensor:
    """The same values as every other token of something longer, or row of a weight."""
    return torch.stack([x, torch.full_like(x, 1e4)], -2).flatten(-3, -2)[..., ::2, :]


def batch_inner(x: Tensor) -> Tensor:
    """The same values, the batch axis inside the token axis."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def shifted(x: Tensor) -> Tensor:
    """The same values and strides, one element off a boundary of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


# what (weight, bias, *three blocks) become; gradients are compared in the layout before that
CHANGES = {
    "blocks-transposed": lambda w, b, *blocks: (w, b, *map(transposed, blocks)),
    "blocks-interleaved": lambda w, b, *blocks: (w, b, *map(interleaved, blocks)),
    "blocks-batch-inner": lambda w, b, *blocks: (w, b, *map(batch_inner, blocks)),
    "each-block-another": lambda w, b, x, y, z: (w, b, x, transposed(y), interleaved(z)),
    "unaligned-and-another": lambda w, b, x, y, z: (w, b, x, shifted(y), batch_inner(z)),
    "one-block-thrice": lambda w, b, x, *_: (w, b, x, x, x),
    "blocks-expanded": lambda w, b, *blocks: (w, b, *(block[:1].expand(4, -1, -1) for block in blocks)),
    "weight-rows": lambda w, *rest: (interleaved(w), *rest),
    "weight-columns": lambda w, *rest: (torch.cat([1e4 + w, w], 1)[:, w.shape[1] :], *rest),
    "weight-transposed": lambda w, *rest: (transposed(w), *rest),
    "bias-every-other": lambda w, b, *blocks: (w, interleaved(b[:, None])[:, 0], *blocks),
}
# Blocks, batch, tokens, channels, N, bias; they stand around 32 x 32 x 32, the tile of the interpreter.
SHAPES = {
    "one-tile": (2, 1, 32, 32, 32),
    "tails-of-all": (3, 1, 33, 33, 33),
    "columns-one-short": (2, 1, 31, 31, 63),
    "one-block": (1, 2, 20, 40, 40),
    "thirty-two-blocks": (32, 1, 4, 8, 40),
    "one-channel": (5, 1, 40, 1, 20, False),
    "many-images": (2, 40, 1, 16, 16),
    "rows-of-tiles": (1, 1, 130, 16, 70),  # more tile rows than group_m
    "no-images": (3, 0, 5, 8, 12),
    "no-tokens": (3, 2, 0, 8, 12),
}
# merge size, grid; tokens of no window are left out, and get a gradient of zero
GRIDS = {
    "merge-square": (2, (4, 4)),
    "merge-wide": (2, (2, 34)),
    "merge-tall": (2, (6, 4)),
    "merge-3": (3, (6, 3)),
    "merge-4": (4, (4, 8)),
    "merge-one-window": (3, (3, 3)),
    "merge-last-of-both": (2, (5, 7)),
    "merge-3-last-of-both": (3, (5, 4)),
    "merge-4-last-row": (4, (9, 8)),
    "merge-nothing-left": (2, (1, 4)),
}
CASES = {name: concat(*shape, activation="gelu") for name, shape in SHAPES.items()}
CASES |= {f"act-{act}": concat(3, 2, 14, 16, 40, crop=1, skip_tokens=1, activation=act) for act in ACTIVATIONS}
CASES |= {
    "skip-four": concat(3, 2, 10, 16, 24, False, skip_tokens=4, activation="silu"),
    "skip-all": concat(3, 2, 3, 8, 12, skip_tokens=3, activation="gelu"),
}
CASES |= {name: concat(3, 2, 9, 33, 24, activation="gelu", change=change) for name, change in CHANGES.items()}
CASES |= {name: merge(2, grid, 9, 35, r, crop=1, skip_tokens=1, activation="silu") for name, (r, grid) in GRIDS.items()}
CASES |= {
    "merge-no-images": merge(0, (4, 6), 12, 40),
    "merge-channel-major": merge(3, (4, 6), 12, 40, activation="gelu", feature_order="channel_major"),
    "merge-channel-major-3": merge(2, (5, 4), 9, 35, 3, feature_order="channel_major"),
    "merge-transposed": merge(2, (4, 6), 12, 40, layout=transposed, skip_tokens=1),
    "merge-interleaved": merge(2, (4, 6), 12, 40, layout=interleaved, activation="gelu_tanh", skip_tokens=1),
    "merge-batch-inner": merge(2, (4, 6), 12, 40, layout=batch_inner, skip_tokens=2),
}
EACH_FUNCTION = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
