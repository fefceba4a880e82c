"""If this fails, a function, a module or a gradient of one differs from its reference on the torch path: a block, a
window, a tail, a stride, the bias, the activation, in some dtype; or state dicts do. Or weights of one feature order
are read as the other's, of which no shape tells: F.unfold is the witness, channel-major; neither package uses it."""

import pytest
import torch
import torch.nn.functional as F
from support.modules import EACH_CASE, EACH_MODULE, build, compare_case, draw, flat
from support.operators import EACH_FUNCTION

import reference
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


@pytest.mark.parametrize("package", [stf_kernels, reference], ids=["stf_kernels", "reference"])
@pytest.mark.parametrize(("merge_size", "grid"), [(1, (3, 4)), (2, (4, 6)), (3, (3, 6)), (4, (8, 4)), (2, (5, 7))])
def test_channel_major_is_unfold(package, merge_size, grid):
    x = torch.randn(2, grid[0] * grid[1], 5, dtype=torch.float64)
    weight = torch.randn(7, merge_size**2 * 5, dtype=torch.float64)
    unfolded = F.unfold(x.mT.unflatten(2, grid), merge_size, stride=merge_size).mT  # [B, windows, C*r*r]
    options = {"grid": grid, "merge_size": merge_size, "truncate": True}
    found = package.spatial_merge_linear(x, weight, feature_order="channel_major", **options)
    torch.testing.assert_close(found, unfolded @ weight.t())
    converted = package.channel_to_patch_major(weight, merge_size)  # once, as a module's weight is
    torch.testing.assert_close(package.spatial_merge_linear(x, converted, **options), found)
    assert converted.is_contiguous()
    assert torch.equal(package.patch_to_channel_major(converted, merge_size), weight)
    for dtype in (torch.bfloat16, torch.int8):
        assert torch.equal(package.channel_to_patch_major(weight.to(dtype), merge_size), converted.to(dtype))


def test_relayout_keeps_the_gradient_and_takes_a_strided_weight():
    weight = torch.randn(12, 6, dtype=torch.float64).t().requires_grad_()  # columns are not contiguous
    patch = stf_kernels.channel_to_patch_major(weight, 2)
    assert torch.equal(patch, stf_kernels.channel_to_patch_major(weight.contiguous(), 2))
    patch.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())
