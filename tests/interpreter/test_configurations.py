"""If this fails, some tile configuration computes another result: its tails, its grouping or its split of K."""

import pytest
import torch
from support.stages import compare, compare_indexed, tower

from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig
from stf_kernels.configs.model import others, tiles
from stf_kernels.ops.segments import Stage

CONFIGS = [
    GemmConfig(16, 16, 16, group_m=1),
    GemmConfig(64, 16, 32, group_m=3),
    GemmConfig(16, 64, 64, group_m=8),
    GemmConfig(128, 128, 16, group_m=2),
    GemmConfig(32, 32, 32, split_k=2),
    GemmConfig(16, 32, 16, group_m=2, split_k=3),
    GemmConfig(64, 64, 16, split_k=16),  # more parts than some problems have steps
]
EVERY = pytest.mark.parametrize("config", CONFIGS, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@EVERY
@DTYPES
def test_concatenated(config, dtype):
    compare(config, Stage("gelu"), tower(3, 3, 13, 35, dtype), 45)


@EVERY
@pytest.mark.parametrize("merge_size", [1, 2, 3, 4])
def test_merged_on_load(config, merge_size):
    grid = (2 * merge_size + merge_size // 2, 3 * merge_size)  # the last rows belong to no window
    compare(config, Stage("silu", merge_in=merge_size, grid=grid), tower(1, 2, grid[0] * grid[1], 10), 37)


@EVERY
@pytest.mark.parametrize("merge_size", [2, 3])
def test_merged_on_store(config, merge_size):
    grid = (2 * merge_size + 1, 3 * merge_size + 1)  # rows and columns that are not stored
    compare(config, Stage(merge_out=merge_size, grid=grid), tower(2, 2, grid[0] * grid[1], 10), 21)


@EVERY
def test_blocks_of_unlike_strides(config):
    blocks = [torch.randn(2, 9, 35) for _ in range(3)]
    padded = torch.full((2, 9, 50), 1e9)
    padded[..., :35] = blocks[0]
    blocks[0] = padded[..., :35]  # what lies past C must not be read into the sum
    blocks[1] = torch.stack([blocks[1]] * 2, 2).flatten(1, 2)[:, ::2]
    blocks[2] = blocks[2].transpose(0, 1).contiguous().transpose(0, 1)
    compare(config, Stage(), blocks, 45)


@EVERY
@DTYPES
def test_rows_outside_out_are_not_written(config, dtype):
    """Two launches with the same result: each of a split K has counters of its own that begin at zero."""
    compare_indexed(config, tower(2, 2, 11, 20, dtype), 40)


SHIPPED = {
    config
    for arch in SHARED_MEMORY_LIMIT
    for itemsize in (2, 4)
    for config in (*tiles(arch, itemsize), *others(arch, itemsize))
}


@pytest.mark.parametrize("config", sorted(SHIPPED, key=str), ids=str)
def test_every_shipped_tile(config):
    """What the model and the tuner launch on a GPU, on rows, features and channels that end inside a tile."""
    count, c = {"pointer": (2, 72), "tma": (2, 128), "swap_ab": (1, 72)}[config.form]
    compare(config, Stage("gelu"), tower(count, 1, 150, c, torch.float16), 136)
