"""If this fails, an operand is read as if it were contiguous: a CLS crop, blocks of unlike strides, a strided bias."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import concat_operands, concat_pair, merge_operands, merge_pair

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def transposed(x):
    """The same values, last axis not contiguous."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def interleaved(x):
    """The same values as every other token of something longer."""
    return torch.stack([x, torch.full_like(x, 1e4)], 2).flatten(1, 2)[:, ::2]


def batch_inner(x):
    """The same values, the batch axis inside the token axis."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = (transposed, interleaved, batch_inner)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_all_blocks_strided(layout, dtype):
    def call(run):
        return lambda weight, bias, *blocks: run(weight, bias, *map(layout, blocks))

    pair = concat_pair(3, activation="gelu")
    compare_functions(*map(call, pair), concat_operands(3, 2, 9, 16, 24), dtype, gradients=True)


@DTYPES
def test_every_block_with_strides_of_its_own(dtype):
    def call(run):
        return lambda weight, bias, a, b, c, d: run(weight, bias, a, transposed(b), interleaved(c), batch_inner(d))

    pair = concat_pair(4, activation="gelu")
    compare_functions(*map(call, pair), concat_operands(4, 2, 9, 16, 24), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_merge_of_a_strided_input(layout, dtype):
    def call(run):
        return lambda weight, bias, x: run(weight, bias, layout(x))

    pair = merge_pair(grid=(4, 6), activation="gelu", skip_tokens=1)
    compare_functions(*map(call, pair), merge_operands(2, 25, 12, 40, 2), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("axis", ["rows", "columns", "transposed"])
def test_strided_weight(axis, dtype):
    def view(weight):
        if axis == "rows":
            return torch.stack([weight, torch.full_like(weight, 1e4)], 1).flatten(0, 1)[::2]
        if axis == "columns":
            return torch.cat([torch.full_like(weight, 1e4), weight], 1)[:, weight.shape[1] :]
        return weight.t().contiguous().t()

    def call(run):
        return lambda weight, bias, *blocks: run(view(weight), bias, *blocks)

    pair = concat_pair(3, activation="gelu")
    compare_functions(*map(call, pair), concat_operands(3, 2, 9, 16, 24), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("kind", ["every-other", "expanded"])
def test_strided_bias(kind, dtype):
    def view(bias):
        if kind == "every-other":
            return torch.stack([bias, torch.full_like(bias, 1e4)], 1).flatten()[::2]
        return bias[:1].expand(len(bias))

    def call(run):
        return lambda weight, bias, *blocks: run(weight, view(bias), *blocks)

    compare_functions(*map(call, concat_pair(3)), concat_operands(3, 2, 9, 16, 24), dtype, gradients=True)


@DTYPES
def test_one_image_for_the_whole_batch(dtype):
    """Stride zero on the batch axis."""

    def call(run):
        return lambda weight, bias, *blocks: run(weight, bias, *(block.expand(4, -1, -1) for block in blocks))

    compare_functions(*map(call, concat_pair(3)), concat_operands(3, 1, 9, 16, 24), dtype, gradients=True)
