"""If this fails, weights of one feature order are read as the other's: shapes agree, outputs are silently wrong.

The independent witness is F.unfold, which is channel-major; neither package uses it.
"""

import pytest
import torch
import torch.nn.functional as F

import reference
import stf_kernels


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
