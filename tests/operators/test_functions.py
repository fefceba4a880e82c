"""If this fails, act(concat(blocks) @ W^T + b) or act(merge_rxr(x) @ W^T + b) is wrong on the torch path: a block, a
window, a tail, the bias, the activation, or the gradient of one of them in some dtype."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import ACTIVATIONS, concat_operands, concat_pair, merge_operands, merge_pair

import reference
import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
# Without gradients another path: nothing is kept, the activation overwrites its input.
GRADIENTS = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])

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

# merge size, grid
GRIDS = {
    "r1": (1, (3, 5)),
    "square": (2, (4, 4)),
    "wide": (2, (2, 8)),
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


@DTYPES
@GRADIENTS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_concatenations(shape, gradients, dtype):
    count, batch, tokens, channels, n, bias = shape
    operands = concat_operands(count, batch, tokens, channels, n, bias=bias)
    y = compare_functions(*concat_pair(count, activation="gelu"), operands, dtype, gradients=gradients)
    assert y.shape == (batch, tokens, n)
    assert y.is_contiguous()


@DTYPES
@GRADIENTS
@BIAS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_a_concatenation(activation, bias, gradients, dtype):
    pair = concat_pair(3, crop=1, skip_tokens=1, activation=activation)
    compare_functions(*pair, concat_operands(3, 2, 27, 16, 24, bias=bias), dtype, gradients=gradients)


@DTYPES
@pytest.mark.parametrize("skip", [1, 4])
def test_skipped_tokens_are_those_of_a_crop(skip, dtype):
    operands = concat_operands(3, 2, 10, 16, 24)
    skipped = compare_functions(*concat_pair(3, skip_tokens=skip, activation="silu"), operands, dtype)
    cropped = compare_functions(*concat_pair(3, crop=skip, activation="silu"), operands, dtype)
    assert torch.equal(skipped, cropped)


@DTYPES
@GRADIENTS
@pytest.mark.parametrize(("batch", "tokens", "skip"), [(0, 5, 0), (0, 5, 1), (2, 0, 0), (2, 3, 3)])
def test_nothing_to_concatenate(batch, tokens, skip, gradients, dtype):
    pair = concat_pair(3, skip_tokens=skip, activation="gelu")
    y = compare_functions(*pair, concat_operands(3, batch, tokens, 8, 12), dtype, gradients=gradients)
    assert y.shape == (batch, tokens - skip, 12)


def test_blocks_come_in_the_order_given():
    """Shapes agree in any order, so only values tell."""
    weight, _, *blocks = concat_operands(3, 1, 4, 8, 8, bias=False)
    ours, theirs = concat_pair(3)
    assert not torch.allclose(ours(weight, None, *blocks), theirs(weight, None, *reversed(blocks)), atol=1e-2)


def test_one_tensor_twice():
    weight, bias, block = concat_operands(1, 2, 4, 8, 8)
    weight = torch.cat([weight, 2 * weight], 1)

    def call(run):
        return lambda weight, bias, block: run(weight, bias, block, block)

    compare_functions(*map(call, concat_pair(2)), [weight, bias, block], torch.float32, gradients=True)


@DTYPES
@GRADIENTS
@pytest.mark.parametrize(("merge_size", "grid"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("order", ["patch_major", "channel_major"])
def test_merges(merge_size, grid, order, gradients, dtype):
    operands = merge_operands(3, grid[0] * grid[1], 12, 40, merge_size)
    truncate = any(side % merge_size for side in grid)
    pair = merge_pair(grid=grid, merge_size=merge_size, activation="gelu", feature_order=order, truncate=truncate)
    y = compare_functions(*pair, operands, dtype, gradients=gradients)
    assert y.shape == (3, (grid[0] // merge_size) * (grid[1] // merge_size), 40)
    assert y.is_contiguous()


@DTYPES
@GRADIENTS
@BIAS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_a_merge(activation, bias, gradients, dtype):
    pair = merge_pair(grid=(4, 6), activation=activation)
    compare_functions(*pair, merge_operands(2, 24, 12, 40, 2, bias=bias), dtype, gradients=gradients)


@DTYPES
@GRADIENTS
@pytest.mark.parametrize(("batch", "crop", "skip"), [(2, 0, 1), (2, 1, 0), (2, 1, 2), (0, 0, 0)])
def test_class_tokens_and_an_empty_batch(batch, crop, skip, gradients, dtype):
    operands = merge_operands(batch, crop + skip + 24, 12, 40, 2)
    pair = merge_pair(crop, grid=(4, 6), skip_tokens=skip, activation="silu")
    assert compare_functions(*pair, operands, dtype, gradients=gradients).shape == (batch, 6, 40)


def test_a_gradient_of_stride_zero():
    """What `y.sum().backward()` sends back."""
    weight, bias, *blocks = (t.requires_grad_() for t in concat_operands(2, 2, 5, 8, 12))
    found, exact = (
        torch.autograd.grad(
            package.concat_linear(blocks, weight, bias, activation="gelu").sum(), (weight, bias, *blocks)
        )
        for package in (stf_kernels, reference)
    )
    torch.testing.assert_close(found, exact)
