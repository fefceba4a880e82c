"""If this fails, two runs of one training step differ: a sum whose order depends on the run."""

import pytest
import torch

import stf_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    module = stf_kernels.CompactTokenProjector(4, 16, 40, skip_tokens=1, dtype=dtype)
    blocks = [torch.randn(3, 17, 16, dtype=dtype, requires_grad=True) for _ in range(4)]
    leaves = [*blocks, *module.parameters()]
    runs = []
    for _ in range(3):
        y = module(blocks)
        runs.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
