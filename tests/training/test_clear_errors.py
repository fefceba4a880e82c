"""If this fails, what cannot be differentiated or computed gives a wrong number instead of a clear error."""

import pytest
import torch
from support.modules import EACH_MODULE, build, draw, flat


@pytest.fixture
def case(name):
    """A module's parameters, a block of what it is called on, and the result."""
    module, x = build(name), draw(name, requires_grad=True)
    return list(module.parameters()), flat(x)[0], module(x)


@EACH_MODULE
def test_double_backward(case):
    _, block, y = case
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph.*torch\.func"):
        torch.autograd.grad(y.sum(), block, create_graph=True)


def test_double_backward_through_the_dispatcher():
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    y = torch.ops.stf_kernels.concat_linear([x, x], [weight], [], "gelu", 0, 1, 0, 0, [True] * 3)[0]
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@EACH_MODULE
def test_a_batch_of_gradients(case):
    """Of either kind of batched tensors that torch has."""
    _, block, y = case
    batch = torch.randn(5, *y.shape)
    with pytest.raises(RuntimeError, match=r"batch of gradients.*jacrev"):
        torch.autograd.grad(y, block, batch, is_grads_batched=True)
    with pytest.raises(RuntimeError, match=r"batch of gradients.*jacrev"):
        torch.func.vmap(lambda dy: torch.autograd.grad(y, block, dy)[0])(batch)


@EACH_MODULE
@pytest.mark.parametrize("changed", ["block", "weight"])
def test_in_place_change_of_a_saved_tensor(case, changed):
    (weight, *_), block, y = case
    with torch.no_grad():
        (block if changed == "block" else weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH_MODULE
def test_changing_the_output_in_place_is_allowed_and_a_second_backward_not(case):
    parameters, _, y = case
    expected = torch.autograd.grad((y * 3).sum(), parameters, retain_graph=True)
    total = y.mul_(3).sum()
    torch.testing.assert_close(torch.autograd.grad(total, parameters), expected)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


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
