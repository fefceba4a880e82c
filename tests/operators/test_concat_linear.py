"""If this fails, act(concat(blocks) @ W^T + b) is wrong on the torch path: a block, a tail, bias or activation."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import ACTIVATIONS, concat_operands, concat_pair

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# blocks, batch, tokens, channels, N, bias
SHAPES = {
    "plain": (3, 2, 9, 16, 24, True),
    "no-bias": (3, 2, 9, 16, 24, False),
    "one-block": (1, 2, 9, 16, 24, True),
    "thirty-two-blocks": (32, 1, 6, 8, 40, True),
    "one-token": (4, 1, 1, 32, 64, True),
    "odd": (5, 3, 7, 13, 29, True),
    "one-channel": (7, 2, 20, 1, 33, True),
    "one-output": (3, 4, 50, 16, 1, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    count, batch, tokens, channels, n, bias = shape
    operands = concat_operands(count, batch, tokens, channels, n, bias=bias)
    y = compare_functions(*concat_pair(count, activation="gelu"), operands, dtype)
    assert y.shape == (batch, tokens, n)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    compare_functions(*concat_pair(3, activation=activation), concat_operands(3, 2, 25, 16, 24), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [1, 4])
def test_skipped_tokens_are_those_of_a_crop(skip, dtype):
    operands = concat_operands(3, 2, 10, 16, 24)
    skipped = compare_functions(*concat_pair(3, skip_tokens=skip, activation="silu"), operands, dtype)
    cropped = compare_functions(*concat_pair(3, crop=skip, activation="silu"), operands, dtype)
    assert torch.equal(skipped, cropped)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_crop_and_skip_together(dtype):
    compare_functions(*concat_pair(3, crop=1, skip_tokens=2), concat_operands(3, 2, 10, 16, 24), dtype)


@pytest.mark.parametrize(("batch", "tokens", "skip"), [(0, 5, 0), (0, 5, 1), (2, 0, 0), (2, 3, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_compute(batch, tokens, skip, dtype):
    pair = concat_pair(3, skip_tokens=skip, activation="gelu")
    y = compare_functions(*pair, concat_operands(3, batch, tokens, 8, 12), dtype)
    assert y.shape == (batch, tokens - skip, 12)


def test_blocks_come_in_the_order_given():
    """Shapes agree in any order, so only values tell."""
    weight, _, *blocks = concat_operands(3, 1, 4, 8, 8, bias=False)
    ours, theirs = concat_pair(3)
    assert not torch.allclose(ours(weight, None, *blocks), theirs(weight, None, *reversed(blocks)), atol=1e-2)


def test_a_tuple_of_blocks_and_one_tensor_twice():
    weight, bias, block = concat_operands(1, 2, 4, 8, 8)
    weight = torch.cat([weight, 2 * weight], 1)

    def call(run):
        return lambda weight, bias, block: run(weight, bias, block, block)

    compare_functions(*map(call, concat_pair(2)), [weight, bias, block], torch.float32, gradients=True)
