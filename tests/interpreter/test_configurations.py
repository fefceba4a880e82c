"""If this fails, some configuration computes another result: its tails, its grouping, its split of K; or a kernel that
fetches its tiles by TMA is launched on operands that a descriptor cannot name."""

import pytest
import torch
import triton
import triton.language as tl
from support.operators import shifted
from support.stages import compare, compare_indexed, tower

from stf_kernels import configs
from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig
from stf_kernels.configs.model import others, tiles
from stf_kernels.kernels.segmented_linear import tile_of_program
from stf_kernels.ops import launch, tma
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


@triton.jit
def tiles_in_order(order_ptr, M, N, GROUP_M: tl.constexpr):
    program = tl.program_id(0)
    tile_m, tile_n = tile_of_program(program, M, N, 16, 16, GROUP_M)
    tl.store(order_ptr + 2 * program, tile_m)
    tl.store(order_ptr + 2 * program + 1, tile_n)


def test_tiles_of_a_group_share_what_they_read_of_w():
    """Eleven rows of tiles, about four at a time: groups of four, four and three, each column by column."""
    order = torch.empty(33, 2, dtype=torch.int32)
    tiles_in_order[(33,)](order, 11 * 16 - 3, 3 * 16, GROUP_M=4)
    groups = (range(4), range(4, 8), range(8, 11))
    assert order.tolist() == [[row, column] for rows in groups for column in range(3) for row in rows]


def test_addresses_that_the_compiler_is_told_of():
    """Distances of blocks in elements of which 16 bytes are a multiple; a block off them forbids that."""
    blocks, weight, stage = tower(2, 1, 16, 32, torch.float16), torch.randn(8, 64).half(), Stage()
    for given, alignment in ((blocks, 8), ([blocks[0], shifted(blocks[1])], 1)):
        tensors = given, weight, None, torch.empty(1, 16, 8), None, None
        assert launch.ARGUMENTS["pointer"](CONFIGS[0], tensors, stage)[-1]["ALIGNMENT"] == alignment


ASKED = [(arch, itemsize) for arch in SHARED_MEMORY_LIMIT for itemsize in (2, 4)]
SHIPPED = {config for what in ASKED for config in (*tiles(*what), *others(*what))}


@pytest.mark.parametrize("config", sorted(SHIPPED, key=str), ids=str)
def test_every_shipped_tile(config):
    """What the model and the tuner launch on a GPU, on rows, features and channels that end inside a tile."""
    count, c = {"pointer": (2, 72), "tma": (2, 128), "swap_ab": (1, 72)}[config.form]
    compare(config, Stage("gelu"), tower(count, 1, 150, c, torch.float16), 136)


TMA = [
    GemmConfig(64, 32, 16, form="tma"),
    GemmConfig(128, 16, 32, group_m=2, form="tma"),
    GemmConfig(192, 32, 32, group_m=1, form="tma"),
    GemmConfig(256, 64, 16, form="tma"),
]
SWAP_AB = [
    GemmConfig(16, 32, 16, form="swap_ab", tail_m=16),
    GemmConfig(128, 16, 32, group_m=1, form="swap_ab", tail_m=16),
    GemmConfig(32, 32, 32, form="swap_ab", tail_m=16, split_k=3),
    GemmConfig(32, 64, 16, form="swap_ab", tail_m=32, split_k=16),  # more parts than steps
]


@DTYPES
@pytest.mark.parametrize("config", TMA, ids=str)
@pytest.mark.parametrize(("count", "batch", "tokens"), [(3, 3, 64), (8, 2, 192), (1, 2, 128), (2, 1, 100)])
def test_blocks_of_a_tower(config, dtype, count, batch, tokens):
    compare(config, Stage("gelu"), tower(count, batch, tokens, 32, dtype, gap=32), 40)


@pytest.mark.parametrize("config", TMA, ids=str)
def test_blocks_in_any_order_of_addresses(config):
    blocks = tower(4, 2, 64, 32, gap=4)
    compare(config, Stage(), [blocks[i] for i in (2, 0, 3, 2)], 24)


@DTYPES
@pytest.mark.parametrize("config", SWAP_AB, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "c", "n"), [(1, 144, 48, 80), (2, 9, 136, 33), (1, 300, 16, 16)])
def test_swap_ab(config, dtype, batch, tokens, c, n):
    """Tails of rows, features and columns: K need not be a multiple of the tile's."""
    compare(config, Stage("gelu"), tower(1, batch, tokens, c, dtype, skip=0), n)


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(16, 16, 16, group_m=2),
        GemmConfig(64, 16, 16, group_m=2, form="tma"),
        GemmConfig(16, 16, 16, group_m=2, form="swap_ab", tail_m=16),
    ],
    ids=str,
)
def test_many_groups_of_tiles(config):
    compare(config, Stage(), tower(1, 1, 25 * config.rows, 16, skip=0), 24)


@pytest.mark.parametrize("config", [TMA[0], TMA[2], SWAP_AB[1], SWAP_AB[2]], ids=str)
def test_descriptors_read_and_rows_placed(config):
    compare(config, Stage(merge_out=2, grid=(8, 9)), tower(1, 2, 72, 32, skip=0), 24)  # a column that is not stored
    compare_indexed(config, tower(1, 1, 70, 32, skip=0), 20)


REFUSED = {
    "boxes would cross images": (lambda: tower(2, 2, 60, 32), TMA[0]),
    "a step would cross segments": (lambda: tower(2, 1, 64, 40), TMA[0]),
    "unlike strides": (lambda: [torch.randn(2, 64, 32), torch.randn(64, 2, 32).transpose(0, 1)], TMA[0]),
    "an address off 16 bytes": (lambda: [shifted(torch.randn(1, 64, 32))], TMA[0]),
    "blocks an odd distance apart": (lambda: tower(2, 1, 64, 32, gap=3), TMA[0]),
    "a pitch off 16 bytes": (lambda: [torch.randn(1, 64, 33)[..., :32]], TMA[0]),
    "an expanded image": (lambda: [torch.randn(1, 64, 32).expand(2, -1, -1)], TMA[0]),
    "rows of two pitches": (lambda: tower(1, 2, 64, 32), SWAP_AB[0]),
    "several blocks": (lambda: tower(2, 1, 64, 32), SWAP_AB[0]),
    "an address off 16 bytes, swapped": (lambda: [shifted(torch.randn(1, 64, 32))], SWAP_AB[2]),
    "merged on load": (lambda: [torch.randn(1, 64, 16)], TMA[0]),
    "merged on load, swapped": (lambda: [torch.randn(1, 64, 16)], SWAP_AB[0]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_operands_that_no_descriptor_names(why, monkeypatch):
    """Who names the configuration is told; where it was the device's choice, the pointer kernel serves."""
    make, config = REFUSED[why]
    blocks = make()
    stage = Stage("silu", merge_in=2, grid=(8, 8)) if "merged" in why else Stage("silu")
    with pytest.raises(tma.Refused, match="no descriptor names"):
        compare(config, stage, blocks, 40)
    monkeypatch.setattr(configs, "choose", lambda *_, **__: (config, True))
    compare(None, stage, blocks, 40)
