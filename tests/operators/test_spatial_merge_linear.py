"""If this fails, act(merge_rxr(x) @ W^T + b) reads the wrong neighbours on the torch path, or cuts a grid wrongly."""

import pytest
import torch
from support.compare import compare_functions
from support.operators import ACTIVATIONS, merge_operands, merge_pair

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# merge size, grid
GRIDS = {
    "r1": (1, (3, 5)),
    "r2-square": (2, (4, 4)),
    "r2-wide": (2, (2, 8)),
    "r2-tall": (2, (6, 4)),
    "r3": (3, (6, 3)),
    "r4": (4, (4, 8)),
    "one-window": (3, (3, 3)),
    "one-token": (1, (1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("merge_size", "grid"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("order", ["patch_major", "channel_major"])
def test_grids(merge_size, grid, order, dtype):
    operands = merge_operands(3, grid[0] * grid[1], 12, 40, merge_size)
    options = {"grid": grid, "merge_size": merge_size, "activation": "gelu", "feature_order": order}
    y = compare_functions(*merge_pair(**options), operands, dtype)
    assert y.shape == (3, (grid[0] // merge_size) * (grid[1] // merge_size), 40)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_activations(activation, bias, dtype):
    pair = merge_pair(grid=(4, 6), activation=activation)
    compare_functions(*pair, merge_operands(2, 24, 12, 40, 2, bias=bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(5, 4), (4, 5), (5, 7)])
@pytest.mark.parametrize("merge_size", [2, 3])
def test_truncate_drops_the_last_rows_and_columns(grid, merge_size, dtype):
    operands = merge_operands(2, grid[0] * grid[1], 8, 33, merge_size)
    compare_functions(*merge_pair(grid=grid, merge_size=merge_size, truncate=True), operands, dtype)


def test_truncate_may_leave_nothing():
    y = compare_functions(
        *merge_pair(grid=(1, 4), truncate=True, activation="gelu"), merge_operands(2, 4, 8, 5, 2), torch.float32
    )
    assert y.shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("crop", "skip"), [(0, 1), (1, 0), (1, 2)])
def test_class_tokens(crop, skip, dtype):
    operands = merge_operands(2, crop + skip + 24, 12, 40, 2)
    compare_functions(*merge_pair(crop, grid=(4, 6), skip_tokens=skip), operands, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype):
    y = compare_functions(*merge_pair(grid=(4, 6), activation="silu"), merge_operands(0, 24, 12, 7, 2), dtype)
    assert y.shape == (0, 6, 7)
