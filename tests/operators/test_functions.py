"""If this fails, act(concat(blocks) @ W^T + b) or act(merge_rxr(x) @ W^T + b) is wrong on the torch path: a block, a
window, a tail, a stride, the bias, the activation, or the gradient of one of them in some dtype."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import (
    ACTIVATIONS,
    CHANGES,
    GRIDS,
    LAYOUTS,
    SHAPES,
    changed,
    concat_operands,
    concat_pair,
    merge_operands,
    merge_pair,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
# Without gradients another path: nothing is kept, the activation overwrites its input.
GRADIENTS = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])


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
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
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
@pytest.mark.parametrize(("batch", "tokens", "skip"), [(0, 5, 1), (2, 3, 3)])
def test_nothing_to_concatenate(batch, tokens, skip, gradients, dtype):
    pair = concat_pair(3, skip_tokens=skip, activation="gelu")
    y = compare_functions(*pair, concat_operands(3, batch, tokens, 8, 12), dtype, gradients=gradients)
    assert y.shape == (batch, tokens - skip, 12)


@DTYPES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_strides_of_a_concatenation(change, dtype):
    pair = changed(concat_pair(3, activation="gelu"), change)
    compare_functions(*pair, concat_operands(3, 2, 9, 16, 24), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_a_merge(layout, dtype):
    pair = changed(merge_pair(grid=(4, 6), activation="gelu", skip_tokens=1), lambda w, b, x: (w, b, layout(x)))
    compare_functions(*pair, merge_operands(2, 25, 12, 40, 2), dtype, gradients=True)


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
@pytest.mark.parametrize(("batch", "crop", "skip"), [(2, 0, 1), (2, 1, 0), (2, 1, 2), (0, 0, 0)])
def test_class_tokens_and_an_empty_batch(batch, crop, skip, gradients, dtype):
    operands = merge_operands(batch, crop + skip + 24, 12, 40, 2)
    pair = merge_pair(crop, grid=(4, 6), skip_tokens=skip, activation="silu")
    assert compare_functions(*pair, operands, dtype, gradients=gradients).shape == (batch, 6, 40)
