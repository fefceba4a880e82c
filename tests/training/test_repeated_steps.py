"""If this fails, a step does not follow from the one before it: two runs of it differ, or gradients do not add up."""

import pytest
import torch
from support.modules import EACH_MODULE, build, draw, flat


@EACH_MODULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_give_the_same_bits(name, dtype):
    module, x = build(name, dtype=dtype), draw(name, batch=3, dtype=dtype, requires_grad=True)
    leaves, runs = [*flat(x), *module.parameters()], []
    for _ in range(2):
        y = module(x)
        for retain_graph in (True, False):
            runs.append([y, *torch.autograd.grad(y.sum(), leaves, retain_graph=retain_graph)])
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))


@EACH_MODULE
def test_gradients_accumulate(name):
    module, x = build(name), draw(name)
    module(x).sum().backward()
    once = [parameter.grad.clone() for parameter in module.parameters()]
    module(x).sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [2 * gradient for gradient in once])
