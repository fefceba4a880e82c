"""If this fails, an operator's schema, fake or autograd formula is not what torch.library demands of it."""

import pytest
import torch
from torch.library import opcheck

import stf_kernels  # noqa: F401  registers the operators

OPS = torch.ops.stf_kernels
# name -> blocks, shapes of the weights, merge size and grid; blocks are [2, 1 + 24, 4], one of the grids is truncated
OPERATORS = {
    "concat_linear": (3, [(6, 12)], 1, 0, 0),
    "spatial_merge_linear": (1, [(6, 16)], 2, 3, 8),
    "token_fusion_mlp": (1, [(10, 16), (7, 10)], 2, 4, 6),
    "compact_token_projector": (3, [(6, 12), (4, 6), (10, 16), (7, 10)], 2, 4, 6),
}


def operands(name, bias=True, grad=False):
    count, shapes, *_ = OPERATORS[name]
    blocks = [torch.randn(2, 25, 4, requires_grad=grad) for _ in range(count)]
    weights = [torch.randn(*shape, requires_grad=grad) for shape in shapes]
    return blocks, weights, [torch.randn(n, requires_grad=grad) for n, _ in shapes] if bias else []


def static(name, activation="gelu"):
    return activation, 1, *OPERATORS[name][2:]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("activation", ["gelu", None])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_operators(name, activation, grad, bias):
    tensors = operands(name, bias, grad)
    needs = [True] * sum(map(len, tensors)) if grad else []
    opcheck(getattr(OPS, name).default, (*tensors, *static(name, activation), needs))


@pytest.mark.parametrize("trained", [[4], [3], [6], [9], [2, 5], [0]], ids=str)
def test_chains_of_which_a_part_is_trained(trained):
    name = "compact_token_projector"
    groups = operands(name)
    tensors = [tensor for group in groups for tensor in group]
    for i in trained:
        tensors[i].requires_grad_()
    flags = [tensor.requires_grad for tensor in tensors]
    opcheck(OPS.compact_token_projector.default, (*groups, *static(name), flags))


@pytest.mark.parametrize("bias", [True, False])
def test_indexed(bias):
    name, out, rows = "compact_token_projector", torch.zeros(20, 7), torch.randperm(20)[:12]
    opcheck(OPS.compact_token_projector_out.default, (*operands(name, bias), *static(name), out, rows))


@pytest.mark.parametrize("wanted", [[True] * 5, [False, False, True, True, False], [False] * 4 + [True]])
def test_backward_operator(wanted):
    blocks, weights, biases = operands("concat_linear")
    options = static("concat_linear")
    y, *saved = OPS.concat_linear(blocks, weights, biases, *options, [True] * 5)
    kept = [*saved, None], blocks if any(wanted[:4]) else [None] * 3, weights
    opcheck(OPS.concat_linear_bwd.default, (torch.randn_like(y), *kept, [2, 25, 4], [6], *options, wanted))


def test_every_registered_operator_is_checked_here():
    registered = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    names = {name.partition(".")[0] for namespace, _, name in registered if namespace == "stf_kernels"}
    assert names == {*OPERATORS, *(f"{name}_bwd" for name in OPERATORS), "compact_token_projector_out"}


@pytest.mark.parametrize(("flags", "missing"), [([], 0), ([True, True, True, False], 3)])
def test_gradient_without_what_the_backward_needs_is_a_clear_error(flags, missing):
    blocks, weights, _ = operands("concat_linear", grad=True)
    y = OPS.concat_linear(blocks, weights, [], *static("concat_linear"), flags)[0]
    with pytest.raises(RuntimeError, match=f"needs: the gradient of tensor {missing}"):
        y.sum().backward()
