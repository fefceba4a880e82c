"""If this fails, what cannot be differentiated or computed gives a wrong number instead of a clear error."""

import pytest
import torch

import stf_kernels

NAMES = pytest.mark.parametrize("name", ["MultiBlockTokenFusion", "SpatialTokenFusion", "CompactTokenProjector"])


def build(name, **options):
    args = {"MultiBlockTokenFusion": (3, 8), "SpatialTokenFusion": (8, 20), "CompactTokenProjector": (3, 8, 20)}[name]
    blocks = [torch.randn(2, 16, 8, requires_grad=True) for _ in range(3)]
    return getattr(stf_kernels, name)(*args, **options), blocks, (blocks[0] if name == "SpatialTokenFusion" else blocks)


@NAMES
def test_double_backward(name):
    module, blocks, x = build(name)
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph"):
        torch.autograd.grad(module(x).sum(), blocks[0], create_graph=True)


def test_double_backward_through_the_dispatcher():
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    y = torch.ops.stf_kernels.concat_linear([x, x], [weight], [], "gelu", 0, 1, 0, 0, [True] * 3)[0]
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@NAMES
@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_a_batch_of_gradients(name, way):
    module, blocks, x = build(name)
    y = module(x)
    backward = {
        "is_grads_batched": lambda dy: torch.autograd.grad(y, blocks[0], dy, is_grads_batched=True),
        "vmap": torch.func.vmap(lambda dy: torch.autograd.grad(y, blocks[0], dy)[0]),
    }[way]
    with pytest.raises(RuntimeError, match=r"batch of gradients.*jacrev"):
        backward(torch.randn(5, *y.shape))


@NAMES
@pytest.mark.parametrize("changed", ["block", "weight"])
def test_in_place_change_of_a_saved_tensor(name, changed):
    module, blocks, x = build(name)
    y = module(x)
    with torch.no_grad():
        (blocks[0] if changed == "block" else next(module.parameters())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changing_the_output_in_place_is_allowed():
    module, _, x = build("CompactTokenProjector")
    expected = torch.autograd.grad((module(x) * 3).sum(), module.stf.linear_2.bias)[0]
    torch.testing.assert_close(torch.autograd.grad(module(x).mul_(3).sum(), module.stf.linear_2.bias)[0], expected)


def test_backward_twice_without_retaining():
    module, _, x = build("CompactTokenProjector")
    y = module(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@NAMES
@pytest.mark.parametrize("order", ["constructed", "moved"])
def test_a_module_on_meta(name, order):
    module, _, x = build(name, device="meta" if order == "constructed" else None)
    if order == "moved":
        module.to("meta")
    with pytest.raises(ValueError, match=r"weight.*device.*cpu.*meta.*to_empty"):
        module(x)


@NAMES
def test_everything_on_meta_gives_shapes(name):
    module, _, x = build(name, device="meta")
    x = [block.to("meta") for block in x] if isinstance(x, list) else x.to("meta")
    y = module(x)
    assert y.device.type == "meta"
    assert y.shape == {"MultiBlockTokenFusion": (2, 16, 8)}.get(name, (2, 4, 20))


def test_a_gradient_with_respect_to_an_operand_that_is_not_used():
    module, _blocks, x = build("CompactTokenProjector")
    other = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(module(x).sum(), other)
