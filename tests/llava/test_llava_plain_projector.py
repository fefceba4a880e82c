"""Broken if this fails: a folder loaded without stf_kernels computes something else, or refuses its weights."""

import pytest
import torch

import reference
from llava_integration.core import plain_projector


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(("blocks", "skip", "mbtf"), [(3, 1, True), (1, 0, True), (1, 1, False)])
@pytest.mark.parametrize(("merge_size", "grid"), [(1, (3, 5)), (2, (4, 6)), (3, (7, 8))])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_reference(activation, blocks, skip, mbtf, merge_size, grid, bias):
    sizes = {"merge_size": merge_size, "skip_tokens": skip, "mbtf": mbtf, "mbtf_hidden_dim": 24, "stf_hidden_dim": 40}
    options = sizes | {"activation": activation, "bias": bias, "truncate": True, "dtype": torch.float64}
    ours, theirs = (p.CompactTokenProjector(blocks, 8, 12, **options) for p in (plain_projector, reference))
    ours.load_state_dict(theirs.state_dict())
    states = [torch.randn(2, skip + grid[0] * grid[1], 8, dtype=torch.float64) for _ in range(blocks)]
    with torch.no_grad():
        got, expected = ours(states, grid), theirs(states, grid)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
        out, rows = torch.zeros(40, 12, dtype=torch.float64), torch.randperm(40)[: expected.shape[:2].numel()]
        assert ours(states, grid, out=out, rows=rows) is out
        assert torch.equal(out[rows], got.flatten(0, 1))
