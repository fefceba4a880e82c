"""If this fails, a kernel that fetches its tiles by TMA computes another result, or is launched on operands that a
descriptor cannot name."""

import pytest
import torch
from support.operators import shifted
from support.stages import compare, compare_indexed, tower

from stf_kernels import configs
from stf_kernels.configs import GemmConfig
from stf_kernels.ops import tma
from stf_kernels.ops.segments import Stage

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
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


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
@pytest.mark.parametrize(("batch", "tokens", "c", "n"), [(1, 144, 48, 80), (2, 9, 40, 33), (1, 300, 16, 16)])
def test_swap_ab(config, dtype, batch, tokens, c, n):
    """Tails of rows, features and columns: K need not be a multiple of the tile's."""
    compare(config, Stage("gelu"), tower(1, batch, tokens, c, dtype, skip=0), n)


@pytest.mark.parametrize("config", [*TMA[:2], SWAP_AB[2]], ids=str)
def test_merged_on_store(config):
    compare(config, Stage(merge_out=2, grid=(8, 9)), tower(1, 2, 72, 32, skip=0), 24)  # a column that is not stored


@pytest.mark.parametrize("config", [TMA[0], TMA[2], SWAP_AB[1], SWAP_AB[2]], ids=str)
def test_indexed_rows(config):
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
    monkeypatch.setattr(configs, "choose", lambda *_, **__: config)
    compare(None, stage, blocks, 40)
