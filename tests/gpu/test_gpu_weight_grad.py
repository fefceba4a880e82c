"""If this fails, the segmented weight gradient is wrong on this GPU: at LLaVA's sizes, at odd ones, or run to run.

It is no default; a failure here costs a saving and no result.
"""

import pytest
import torch
from support.rule import assert_within_rule

from stf_kernels.ops.segments import Stage
from stf_kernels.ops.weight_grad import by_library, launch_wgrad
from stf_kernels.configs.model import wgrad_tiles
from stf_kernels.configs import device_identity

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
SHAPES = {
    # stage, blocks, batch, tokens, channels, features
    "llava": (Stage(), 8, 2, 576, 1024, 4096),
    "odd": (Stage(), 3, 3, 77, 200, 300),
    "gather": (Stage(merge_in=2, grid=(24, 24)), 1, 2, 576, 256, 520),
    "truncated": (Stage(merge_in=3, grid=(11, 10)), 1, 3, 110, 40, 72),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_tile(shape, dtype):
    stage, count, batch, tokens, c, n = shape
    memory = torch.full((count, batch, tokens + 1, c), float("nan"), device="cuda", dtype=dtype)
    memory[:, :, 1:] = torch.randn(count, batch, tokens, c, device="cuda").to(dtype)
    blocks = [block[:, 1:] for block in memory]  # the class token's row must not enter
    g = torch.randn(batch * stage.tokens(blocks[0].shape), n, device="cuda").to(dtype)
    size = n, count * stage.merge_in**2 * c
    same = by_library(g, blocks, size, stage)
    exact = by_library(g.double(), [block.double() for block in blocks], size, stage)
    for config in wgrad_tiles(device_identity(torch.cuda.current_device())[1], dtype.itemsize):
        found = launch_wgrad(g, blocks, stage, config)
        assert_within_rule(f"{config} {dtype}", found, same, exact)
        assert torch.equal(found, launch_wgrad(g, blocks, stage, config))
