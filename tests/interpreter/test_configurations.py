"""If this fails, some tile configuration computes another result: its tails, its grouping or its split of K."""

import pytest
import torch
from support.rule import assert_within_rule

from reference.functional import activate, spatial_merge
from stf_kernels.ops import forms
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage, merge_windows
from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig
from stf_kernels.configs.model import tma_tiles, split_tiles, swap_ab_tiles, tiles

CONFIGS = [
    GemmConfig(16, 16, 16, group_m=1),
    GemmConfig(64, 16, 32, group_m=3),
    GemmConfig(16, 64, 64, group_m=8),
    GemmConfig(128, 128, 16, group_m=2),
    GemmConfig(32, 32, 32, split_k=2),
    GemmConfig(16, 32, 16, group_m=2, split_k=3),
    GemmConfig(64, 64, 16, split_k=16),  # more parts than some problems have steps
    GemmConfig(64, 32, 16, form="tma"),
    GemmConfig(16, 32, 16, form="swap_ab", tail_m=16, split_k=2),
]
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
EVERY = pytest.mark.parametrize("config", CONFIGS, ids=str)


def operands(count, batch, tokens, c, n, window=1):
    k = count * window * c
    blocks = [torch.randn(batch, tokens, c) for _ in range(count)]
    return blocks, torch.randn(n, k) / k**0.5, torch.randn(n)


def compare(stage, config, dtype, blocks, weight, bias, dense, place=lambda y: y, **options):
    """dense(blocks) is the matrix A; place puts the reference's rows where the stage stores them."""
    blocks, weight, bias = [block.to(dtype) for block in blocks], weight.to(dtype), bias.to(dtype)
    y, pre = run_stage(blocks, weight, bias, stage, config, save_pre=True, **options)

    def run(to):
        flat = dense([block.to(to) for block in blocks]).flatten(0, 1) @ weight.to(to).t() + bias.to(to)
        return flat, place(activate(flat, stage.activation).view(blocks[0].shape[0], -1, weight.shape[0]))

    (same_pre, same), (exact_pre, exact) = run(dtype), run(torch.float64)
    assert_within_rule("pre-activation", pre, same_pre, exact_pre)
    assert_within_rule("output", y, same, exact)
    return y


@EVERY
@HALF
def test_concat(config, dtype):
    blocks, weight, bias = operands(3, 3, 13, 35, 45)
    compare(Stage("gelu"), config, dtype, blocks, weight, bias, lambda x: torch.cat(x, -1))


@EVERY
@pytest.mark.parametrize("merge_size", [1, 2, 3, 4])
def test_gather(config, merge_size):
    grid = (2 * merge_size + merge_size // 2, 3 * merge_size)  # the last rows belong to no window
    blocks, weight, bias = operands(1, 2, grid[0] * grid[1], 10, 37, merge_size**2)
    stage = Stage("silu", merge_in=merge_size, grid=grid)
    compare(
        stage, config, torch.float32, blocks, weight, bias,
        lambda x: spatial_merge(x[0], grid, merge_size, "patch_major", True),
    )  # fmt: skip


@EVERY
@pytest.mark.parametrize("merge_size", [2, 3])
def test_merged_store(config, merge_size):
    grid = (2 * merge_size + 1, 3 * merge_size + 1)  # rows and columns that are not stored
    blocks, weight, bias = operands(2, 2, grid[0] * grid[1], 10, 21)
    stage = Stage(merge_out=merge_size, grid=grid)

    def place(y):
        return merge_windows(y, grid, merge_size)

    compare(stage, config, torch.float32, blocks, weight, bias, lambda x: torch.cat(x, -1), place)


@EVERY
def test_blocks_of_unlike_strides(config):
    blocks, weight, bias = operands(3, 2, 9, 35, 45)
    blocks[1] = torch.stack([blocks[1]] * 2, 2).flatten(1, 2)[:, ::2]
    blocks[2] = blocks[2].transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((2, 9, 50), 1e9)
    padded[..., :35] = blocks[0]
    blocks[0] = padded[..., :35]  # what lies past C must not be read into the sum

    def run(to):
        return torch.cat([b.to(to) for b in blocks], -1).flatten(0, 1) @ weight.to(to).t() + bias.to(to)

    y, pre = run_stage(blocks, weight, bias, Stage(), config)
    assert pre is None
    assert_within_rule("output", y.flatten(0, 1), run(torch.float32), run(torch.float64))


@EVERY
@HALF
def test_rows_outside_out_are_not_written(config, dtype):
    """The kernel itself guards memory: on a GPU the values of rows are not looked at before."""
    blocks, weight, bias = operands(2, 2, 11, 20, 40)
    blocks, weight, bias = [block.to(dtype) for block in blocks], weight.to(dtype), bias.to(dtype)
    memory = torch.full((40, 40), 7.0, dtype=dtype)
    out = memory[10:30]
    rows = torch.arange(22) - 1
    rows[5], rows[6], rows[7] = 2**40, -(2**40), 20
    y, _ = run_stage(blocks, weight, bias, Stage("gelu"), config, out=out, rows=rows)
    assert y is out
    plain, _ = run_stage(blocks, weight, bias, Stage("gelu"), config)
    written = [i for i, row in enumerate(rows.tolist()) if 0 <= row < 20]
    assert torch.equal(out[rows[written]], plain.flatten(0, 1)[written])
    untouched = sorted(set(range(20)) - set(rows[written].tolist()))
    assert untouched
    assert bool((out[untouched] == 7).all())
    assert bool((memory[:10] == 7).all())
    assert bool((memory[30:] == 7).all())


SHIPPED = {
    config
    for arch in SHARED_MEMORY_LIMIT
    for itemsize in (2, 4)
    for ways in (tiles, split_tiles, tma_tiles, swap_ab_tiles)
    for config in ways(arch, itemsize)
}


@pytest.mark.parametrize("config", sorted(SHIPPED, key=str), ids=str)
def test_every_shipped_tile(config):
    """What the heuristic and the tuner launch on a GPU, on rows, features and channels that end inside a tile."""
    blocks, weight, bias = operands(1 if config.form == "swapped" else 2, 1, 150, 72, 136)
    compare(Stage("gelu"), config, torch.float16, blocks, weight, bias, lambda x: torch.cat(x, -1))


SPLIT = [config for config in CONFIGS if config.split_k > 1]


@pytest.mark.parametrize("config", SPLIT, ids=str)
def test_counters_of_arrival_return_to_zero(config, monkeypatch):
    """On a GPU one buffer of counters serves every launch of a stream; so it does here."""
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(forms, "arrival_counters", lambda tiles, device: counters)
    blocks, weight, bias = operands(1, 2, 30, 35, 45)
    first, _ = run_stage(blocks, weight, bias, Stage("gelu"), config)
    assert bool((counters == 0).all())
    second, _ = run_stage(blocks, weight, bias, Stage("gelu"), config)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"block_m": 24, "block_n": 32, "block_k": 32}, "block_m.*power of two.*24"),
        ({"block_m": 32, "block_n": 8, "block_k": 32}, "block_n.*16.*8"),
        ({"block_m": 32, "block_n": 32, "block_k": 32.0}, r"block_k.*32\.0"),
        ({"block_m": 32, "block_n": 32, "block_k": 32, "num_stages": 0}, "num_stages.*0"),
        ({"block_m": 32, "block_n": 32, "block_k": 32, "split_k": 0}, "split_k.*0"),
        ({"block_m": 32, "block_n": 32, "block_k": 32, "group_m": True}, "group_m.*True"),
        ({"block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 3}, "num_warps.*3"),
        ({"block_m": 32, "block_n": 32, "block_k": 32, "warps": 4}, "unknown field 'warps'"),
        ({"block_m": 32, "block_n": 32}, "block_k.*missing"),
    ],
)
def test_configurations_that_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        GemmConfig.from_dict(values)
