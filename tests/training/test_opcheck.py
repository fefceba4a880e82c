"""If this fails, an operator's schema, fake or autograd formula is not what torch.library demands of it."""

import pytest
import torch
from torch.library import opcheck

import stf_kernels  # noqa: F401  registers the operators

OPS = torch.ops.stf_kernels
STATIC = ("gelu", 1, 2, 4, 6)


def draw(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


def needs(save, *groups):
    """One flag for every tensor, or none."""
    count = sum(len(group) if isinstance(group, list) else group is not None for group in groups)
    return [True] * count if save else []


def chain_operands(layers, bias, grad):
    """blocks, weights, biases of a chain over a 4x6 grid behind one class token."""
    count = 3 if layers == 4 else 1
    blocks = [draw(2, 25, 4, grad=grad) for _ in range(count)]
    shapes = [(6, 12), (4, 6), (10, 16), (7, 10)] if layers == 4 else [(10, 16), (7, 10)]
    weights = [draw(*shape, grad=grad) for shape in shapes]
    return blocks, weights, [draw(n, grad=grad) for n, _ in shapes] if bias else []


@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_concat_linear(activation, save, bias):
    blocks = [draw(2, 5, 4, grad=save) for _ in range(3)]
    tensors = (blocks, draw(6, 12, grad=save), draw(6, grad=save) if bias else None)
    opcheck(OPS.concat_linear.default, (*tensors, activation, 1, needs(save, *tensors)))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("grid", [(4, 6), (5, 5)])
def test_spatial_merge_linear(activation, save, grid):
    x = draw(2, 1 + grid[0] * grid[1], 4, grad=save)
    arguments = (x, draw(6, 16, grad=save), draw(6, grad=save), activation, 1, 2, *grid, [True] * 3 if save else [])
    opcheck(OPS.spatial_merge_linear.default, arguments)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "layers"), [("token_fusion_mlp", 2), ("compact_token_projector", 4)])
def test_chains(name, layers, bias, save):
    tensors = chain_operands(layers, bias, save)
    opcheck(getattr(OPS, name).default, (*tensors, *STATIC, needs(save, *tensors)))


@pytest.mark.parametrize("trained", [[4], [3], [6], [9], [2, 5], [0]], ids=str)
def test_chains_of_which_a_part_is_trained(trained):
    blocks, weights, biases = chain_operands(4, True, False)
    tensors = [*blocks, *weights, *biases]
    for i in trained:
        tensors[i].requires_grad_()
    flags = [tensor.requires_grad for tensor in tensors]
    opcheck(OPS.compact_token_projector.default, (blocks, weights, biases, *STATIC, flags))


def test_chain_without_an_activation():
    opcheck(OPS.compact_token_projector.default, (*chain_operands(4, True, True), None, *STATIC[1:], [True] * 11))


@pytest.mark.parametrize("bias", [True, False])
def test_scatter(bias):
    out, rows = torch.zeros(20, 7), torch.randperm(20)[:12]
    opcheck(OPS.compact_token_projector_out.default, (*chain_operands(4, bias, False), *STATIC, out, rows))


@pytest.mark.parametrize("wanted", [[True] * 5, [False, False, True, True, False]])
def test_backward_operator(wanted):
    blocks, weight = [draw(2, 5, 4, grad=False) for _ in range(3)], draw(6, 12, grad=False)
    y, *saved = OPS.concat_linear(blocks, weight, torch.randn(6), "gelu", 1, [True] * 5)
    kept = [*saved, *blocks, weight]
    arguments = (torch.randn_like(y), kept, 3, [2, 5, 4], [6], "gelu", 1, [True] * 5, wanted)
    opcheck(OPS.concat_linear_bwd.default, arguments)


def test_every_registered_operator_is_checked_here():
    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    names = {name.partition(".")[0] for namespace, _, name in registered if namespace == "stf_kernels"}
    checked = {"concat_linear", "spatial_merge_linear", "token_fusion_mlp", "compact_token_projector"}
    assert names == checked | {f"{name}_bwd" for name in checked} | {"compact_token_projector_out"}


@pytest.mark.parametrize(("flags", "missing"), [([], 0), ([True, True, True, False], 3)])
def test_gradient_without_what_the_backward_needs_is_a_clear_error(flags, missing):
    y = OPS.concat_linear([draw(2, 5, 4) for _ in range(3)], draw(6, 12), None, "gelu", 1, flags)[0]
    with pytest.raises((RuntimeError, ValueError), match=f"needs: the gradient of tensor {missing}"):
        y.sum().backward()
