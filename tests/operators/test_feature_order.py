"""If this fails, weights of one feature order are read as the other's: shapes agree, outputs are silently wrong.

The independent witness is F.unfold, which is channel-major; neither package uses it.
"""

import pytest
import torch
import torch.nn.functional as F

import reference
import stf_kernels

# merge size, grid
GRIDS = [(1, (3, 4)), (2, (4, 6)), (3, (3, 6)), (4, (8, 4)), (2, (5, 7))]


def unfolded(x, grid, merge_size):
    """[B, H*W, C] -> [B, windows, C*r*r], channel-major, windows row-major."""
    image = x.transpose(1, 2).unflatten(2, grid)
    return F.unfold(image, merge_size, stride=merge_size).transpose(1, 2)


@pytest.mark.parametrize("package", [stf_kernels, reference], ids=["stf_kernels", "reference"])
@pytest.mark.parametrize(("merge_size", "grid"), GRIDS)
def test_channel_major_is_unfold(package, merge_size, grid):
    x = torch.randn(2, grid[0] * grid[1], 5, dtype=torch.float64)
    weight = torch.randn(7, merge_size**2 * 5, dtype=torch.float64)
    expected = unfolded(x, grid, merge_size) @ weight.t()
    options = {"grid": grid, "merge_size": merge_size, "truncate": True}
    found = package.spatial_merge_linear(x, weight, feature_order="channel_major", **options)
    torch.testing.assert_close(found, expected)
    converted = package.channel_to_patch_major(weight, merge_size)  # once, as a module's weight is
    torch.testing.assert_close(package.spatial_merge_linear(x, converted, **options), expected)


def test_patch_major_columns_by_hand():
    """Column (dy*r + dx)*C + c of the weight meets channel c at (dy, dx)."""
    x = torch.arange(12, dtype=torch.float64).view(1, 2 * 2, 3)  # a grid of 2x2, C = 3
    y = stf_kernels.spatial_merge_linear(x, torch.eye(12, dtype=torch.float64), grid=(2, 2))
    assert torch.equal(y.flatten(), x.flatten())  # the one window is its rows in order


@pytest.mark.parametrize("merge_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_relayout_round_trip(merge_size, dtype):
    weight = torch.randint(-100, 100, (6, merge_size**2 * 5)).to(dtype)
    patch = stf_kernels.channel_to_patch_major(weight, merge_size)
    assert torch.equal(stf_kernels.patch_to_channel_major(patch, merge_size), weight)
    assert patch.is_contiguous()
    # by hand: column c*r*r + w goes to w*C + c
    expected = torch.stack([weight[:, c * merge_size**2 + w] for w in range(merge_size**2) for c in range(5)], 1)
    assert torch.equal(patch, expected)
    assert torch.equal(patch, reference.channel_to_patch_major(weight, merge_size))
    assert torch.equal(weight, reference.patch_to_channel_major(patch, merge_size))


def test_relayout_keeps_the_gradient_and_takes_a_strided_weight():
    weight = torch.randn(12, 6, dtype=torch.float64).t().requires_grad_()  # columns are not contiguous
    patch = stf_kernels.channel_to_patch_major(weight, 2)
    assert torch.equal(patch, stf_kernels.channel_to_patch_major(weight.contiguous(), 2))
    patch.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


@pytest.mark.parametrize("name", ["channel_to_patch_major", "patch_to_channel_major"])
@pytest.mark.parametrize(
    ("weight", "merge_size", "match"),
    [
        (torch.zeros(6, 10), 2, r"weight.*4.*\(6, 10\)"),
        (torch.zeros(16), 2, r"weight.*\(16,\)"),
        ([[0.0] * 16], 2, r"weight.*tensor.*list"),
        (torch.zeros(6, 16), 0, "merge_size.*0"),
        (torch.zeros(6, 16), 2.0, "merge_size.*2.0"),
        (torch.zeros(6, 16), True, "merge_size.*True"),
    ],
    ids=str,
)
def test_relayout_refuses(name, weight, merge_size, match):
    with pytest.raises((ValueError, TypeError), match=match):
        getattr(stf_kernels, name)(weight, merge_size)
