"""If this fails, a backward disagrees with finite differences of its own forward."""

import pytest
import torch
from support.operators import ACTIVATIONS
from torch.autograd import gradcheck

import stf_kernels


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", ["eager", "dispatcher"])
def test_concat_linear(activation, way):
    def run(weight, bias, *blocks):
        if way == "eager":
            return stf_kernels.concat_linear(blocks, weight, bias, activation=activation, skip_tokens=1)
        static = activation, 1, 1, 0, 0
        return torch.ops.stf_kernels.concat_linear(blocks, [weight], [bias], *static, [True] * 4)[0]

    assert gradcheck(run, (draw(4, 6), draw(4), draw(2, 3, 3), draw(2, 3, 3)))


@pytest.mark.parametrize("grid", [(2, 4), (3, 5)])
@pytest.mark.parametrize("order", ["patch_major", "channel_major"])
def test_spatial_merge_linear(grid, order):
    options = {"grid": grid, "activation": "gelu", "skip_tokens": 1, "truncate": True, "feature_order": order}

    def run(weight, bias, x):
        return stf_kernels.spatial_merge_linear(x, weight, bias, **options)

    assert gradcheck(run, (draw(3, 8), draw(3), draw(2, 1 + grid[0] * grid[1], 2)))


@pytest.mark.parametrize("options", [{}, {"truncate": True, "skip_tokens": 1}, {"bias": False}], ids=str)
def test_projector(options):
    grid = (3, 5) if options.get("truncate") else (2, 4)
    widths = {"mbtf_hidden_dim": 3, "stf_hidden_dim": 4}
    module = stf_kernels.CompactTokenProjector(2, 2, 3, **widths, dtype=torch.float64, **options)
    names = [name for name, _ in module.named_parameters()]

    def run(*tensors):
        blocks, parameters = tensors[:2], dict(zip(names, tensors[2:], strict=True))
        return torch.func.functional_call(module, parameters, (list(blocks), grid))

    tokens = grid[0] * grid[1] + options.get("skip_tokens", 0)
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert gradcheck(run, (draw(1, tokens, 2), draw(1, tokens, 2), *parameters))
