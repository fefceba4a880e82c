"""If this fails, what cannot be differentiated or computed gives a wrong number instead of a clear error."""

import pytest
import torch
from support.modules import EACH_MODULE, build, draw, flat

import stf_kernels


@pytest.fixture
def case(name):
    module, x = build(name), draw(name, requires_grad=True)
    return module, x, flat(x)[0]


@EACH_MODULE
def test_double_backward(case):
    module, x, block = case
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph.*torch\.func"):
        torch.autograd.grad(module(x).sum(), block, create_graph=True)


def test_double_backward_through_the_dispatcher():
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    y = torch.ops.stf_kernels.concat_linear([x, x], [weight], [], "gelu", 0, 1, 0, 0, [True] * 3)[0]
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@EACH_MODULE
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_a_batch_of_gradients(case, way):
    module, x, block = case
    y = module(x)
    backward = {
        "is_grads_batched": lambda dy: torch.autograd.grad(y, block, dy, is_grads_batched=True),
        "vmap": torch.func.vmap(lambda dy: torch.autograd.grad(y, block, dy)[0]),
    }[way]
    with pytest.raises(RuntimeError, match=r"batch of gradients.*jacrev"):
        backward(torch.randn(5, *y.shape))


@EACH_MODULE
@pytest.mark.parametrize("changed", ["block", "weight"])
def test_in_place_change_of_a_saved_tensor(case, changed):
    module, x, block = case
    y = module(x)
    with torch.no_grad():
        (block if changed == "block" else next(module.parameters())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH_MODULE
def test_changing_the_output_in_place_is_allowed(case):
    module, x, _ = case
    parameters = list(module.parameters())
    expected = torch.autograd.grad((module(x) * 3).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(module(x).mul_(3).sum(), parameters), expected)


@EACH_MODULE
def test_backward_twice_without_retaining(case):
    module, x, _ = case
    y = module(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@EACH_MODULE
@pytest.mark.parametrize("order", ["constructed", "moved"])
def test_a_module_on_meta(name, order):
    module = build(name, device="meta") if order == "constructed" else build(name).to("meta")
    with pytest.raises(ValueError, match=r"weight.*device.*cpu.*meta.*to_empty"):
        module(draw(name))


@EACH_MODULE
def test_everything_on_meta_gives_shapes(name):
    module = build(name, device="meta")
    y = module(draw(name, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == {"MultiBlockTokenFusion": (2, 16, 8)}.get(name, (2, 4, 20))
    y.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in module.parameters())


def test_a_stage_that_merges_on_store_has_nothing_else():
    with pytest.raises(ValueError, match="merges on store"):
        stf_kernels.ops.segments.Stage("gelu", merge_out=2, grid=(4, 4))
