"""If this fails, the segmented weight gradient sums other rows than the forward read, or runs where a library would do.

Sizes stand around the tiles: rows of an image that end inside a step, features and channels inside a tile.
"""

import pytest
import torch
from support.compare import compare_modules, twins
from support.stages import compare_wgrad, tower

import stf_kernels
from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig
from stf_kernels.configs.model import tiles
from stf_kernels.ops import weight_grad
from stf_kernels.ops.segments import Stage

CONFIGS = [GemmConfig(16, 16, 16, group_m=1), GemmConfig(64, 32, 16, group_m=2), GemmConfig(32, 64, 64, group_m=8)]
EVERY = pytest.mark.parametrize("config", CONFIGS, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@EVERY
@DTYPES
@pytest.mark.parametrize("tokens", [1, 13, 16, 32])
def test_concatenated(config, dtype, tokens):
    """What stands before, between and behind the rows is infinite: none of it may enter, not even times zero."""
    memory = torch.full((3, 3, tokens + 5, 40), torch.inf)
    memory[:, :, 2:-3, :35] = torch.randn(3, 3, tokens, 35)
    compare_wgrad(config, Stage(), [block[:, 2:-3, :35] for block in memory.to(dtype)], 45)


@EVERY
@DTYPES
@pytest.mark.parametrize("merge_size", [1, 2, 3])
def test_merged_on_load(config, dtype, merge_size):
    grid = (2 * merge_size + merge_size // 2, 3 * merge_size + merge_size // 2)  # the last belong to no window
    compare_wgrad(config, Stage(merge_in=merge_size, grid=grid), tower(1, 2, grid[0] * grid[1], 20, dtype), 37)


SHIPPED = {config for arch in SHARED_MEMORY_LIMIT for size in (2, 4) for config in tiles(arch, size, wgrad=True)}


@pytest.mark.parametrize("config", sorted(SHIPPED, key=str), ids=str)
def test_every_shipped_tile(config):
    compare_wgrad(config, Stage(), tower(2, 2, 50, 72, torch.float16), 136)


@EVERY
def test_strides_of_every_kind(config):
    blocks = [torch.randn(2, 9, 20) for _ in range(4)]
    blocks[1] = blocks[1].transpose(0, 1).contiguous().transpose(0, 1)
    blocks[2] = blocks[2].transpose(1, 2).contiguous().transpose(1, 2)  # copied: its last axis is not contiguous
    blocks[3] = blocks[3][:1].expand(2, -1, -1)
    for g in (torch.randn(33, 18).t(), torch.randn(1, 33).expand(18, 33), torch.randn(18, 50)[:, 7:40]):
        compare_wgrad(config, Stage(), blocks, 33, g)


def test_nothing_to_sum_is_zero():
    for batch, tokens in ((0, 5), (2, 0)):
        dw = weight_grad.launch_wgrad(torch.ones(0, 7), [torch.ones(batch, tokens, 4)], Stage(), CONFIGS[0])
        assert torch.equal(dw, torch.zeros(7, 4))


@pytest.fixture
def launches(monkeypatch):
    """Shapes of the gradients that the kernel was launched for."""
    noted, original = [], weight_grad.launch_wgrad

    def note(g, *rest):
        noted.append(tuple(g.shape))
        return original(g, *rest)

    monkeypatch.setattr(weight_grad, "launch_wgrad", note)
    return noted


@pytest.mark.parametrize(("skip_tokens", "batch", "runs"), [(1, 2, True), (1, 1, False), (0, 2, False)])
def test_it_runs_where_blocks_are_cropped(launches, skip_tokens, batch, runs):
    """And the gradients are the reference's either way."""
    modules = twins("CompactTokenProjector", 3, 8, 12, skip_tokens=skip_tokens, dtype=torch.float32)
    blocks = [torch.randn(batch, 16 + skip_tokens, 8) for _ in range(3)]
    compare_modules(modules, blocks, torch.float32, gradients=True)
    assert launches == ([(batch * 16, 32)] if runs else [])


@pytest.mark.parametrize(("backend", "expected"), [("triton", [(4, 12)]), ("torch", [])])
def test_it_runs_for_an_operand_that_is_merged_and_not_on_the_torch_path(launches, backend, expected):
    with stf_kernels.use_backend(backend):
        weight = torch.randn(12, 32, requires_grad=True)
        stf_kernels.spatial_merge_linear(torch.randn(1, 16, 8), weight, grid=(4, 4)).sum().backward()
    assert launches == expected
