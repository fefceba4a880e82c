"""If this fails, an operand is read as if it were contiguous: a CLS crop, blocks of unlike strides, a strided bias."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import concat_operands, concat_pair, merge_operands, merge_pair

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


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


# what (weight, bias, *blocks) become
CHANGES = {
    "blocks-transposed": lambda w, b, *blocks: (w, b, *map(transposed, blocks)),
    "blocks-interleaved": lambda w, b, *blocks: (w, b, *map(interleaved, blocks)),
    "blocks-batch-inner": lambda w, b, *blocks: (w, b, *map(batch_inner, blocks)),
    "each-block-another": lambda w, b, x, y, z: (w, b, x, transposed(y), interleaved(z)),
    "blocks-expanded": lambda w, b, *blocks: (w, b, *(block[:1].expand(4, -1, -1) for block in blocks)),
    "weight-rows": lambda w, *rest: (interleaved(w), *rest),
    "weight-columns": lambda w, *rest: (later_columns(w), *rest),
    "weight-transposed": lambda w, *rest: (transposed(w), *rest),
    "bias-every-other": lambda w, b, *blocks: (w, every_other(b), *blocks),
    "bias-expanded": lambda w, b, *blocks: (w, b[:1].expand(len(b)), *blocks),
}


def changed(pair, change):
    ours, theirs = pair
    return lambda *operands: ours(*change(*operands)), lambda *operands: theirs(*change(*operands))


@DTYPES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_concat_linear(change, dtype):
    operands = concat_operands(3, 2, 9, 16, 24)
    compare_functions(*changed(concat_pair(3, activation="gelu"), change), operands, dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("layout", [transposed, interleaved, batch_inner], ids=lambda f: f.__name__)
def test_spatial_merge_linear(layout, dtype):
    pair = changed(merge_pair(grid=(4, 6), activation="gelu", skip_tokens=1), lambda w, b, x: (w, b, layout(x)))
    compare_functions(*pair, merge_operands(2, 25, 12, 40, 2), dtype, gradients=True)
