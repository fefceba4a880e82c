"""If this fails, a function, a module or a gradient of one differs from its reference on the torch path: a block, a
window, a tail, a stride, the bias, the activation, in some dtype; or state dicts do."""

import pytest
import torch
from support.modules import EACH_CASE, EACH_MODULE, build, compare_case, draw, flat
from support.operators import EACH_FUNCTION

import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@EACH_FUNCTION
def test_functions(case, dtype):
    case.compare(dtype)


@DTYPES
@EACH_CASE
def test_modules(case, dtype):
    compare_case(case, dtype)


@EACH_MODULE
def test_an_empty_batch_has_gradients_of_zero(name):
    """A rank of a data-parallel run without an image still has to take part in the reduction."""
    ours, x = build(name), draw(name, batch=0, requires_grad=True)
    y = ours(x)
    assert y.shape == (0, *ours(draw(name)).shape[1:])
    y.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (*flat(x), *ours.parameters()))


@EACH_MODULE
def test_dtype_and_device_arguments(name):
    module = build(name, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}
    assert torch.nn.Module.extra_repr(module) != module.extra_repr()  # says something of its own


def test_a_bias_with_gaps_is_added_before_the_sum_is_rounded():
    """90,000 is beyond fp16; F.linear rounds to it first where the bias has gaps."""
    x, weight, bias = torch.full((1, 3, 1), 300.0), torch.full((2, 1), 300.0), torch.full((4,), -6e4)
    y = stf_kernels.concat_linear([x.half()], weight.half(), bias.half()[::2])
    assert (y == 30_000).all()
