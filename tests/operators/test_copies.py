"""If this fails, plain torch on a GPU concatenates or merges other values than there are, or copies them slowly."""

import pytest
import torch

from stf_kernels.ops import torch_path
from stf_kernels.ops.segments import Stage, merge_windows, unmerge_windows

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def moved(monkeypatch):
    """A CPU copies as a GPU does -> the dtypes in which something was moved."""
    seen, view = [], torch.Tensor.view

    def watched(x, *to):
        seen.extend(dtype for dtype in to if dtype is torch.complex128)
        return view(x, *to)

    monkeypatch.setattr(torch_path, "copies_by_element", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "view", watched)
    return seen


def values(shape, dtype):
    """Every bit pattern of a NaN, an infinity or a denormal is a value to move, too."""
    x = torch.randn(shape).to(dtype)
    x.flatten()[::7], x.flatten()[1::7], x.flatten()[2::7] = float("nan"), float("-inf"), torch.finfo(dtype).tiny / 4
    return x


def equal(found, expected):
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_concatenation_of_cropped_blocks(moved, batch, dtype):
    blocks = [values((batch, 17, 24), dtype)[:, 1:] for _ in range(8)]
    assert equal(torch_path.gathered(blocks, Stage()), torch.cat(blocks, -1))
    assert len(moved) == (8 if batch > 1 else 0), "torch has a fast kernel for blocks without gaps"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_a_merge_and_its_adjoint(moved, grid, dtype):
    x, windows = values((2, grid[0] * grid[1], 16), dtype), (grid[0] // 2) * (grid[1] // 2)
    assert equal(torch_path.merged(x, grid, 2), merge_windows(x, grid, 2))
    y = values((2, windows, 64), dtype)
    assert equal(torch_path.unmerged(y, grid, 2), unmerge_windows(y, grid, 2))
    assert len(moved) == 2


@pytest.mark.parametrize("step", [0, 16])
def test_a_merge_that_is_a_view(moved, step):
    x = values((1, 8, 8), torch.bfloat16).repeat(1, 2, 1).as_strided((1, 8, 8), (64, step, 1))
    assert equal(torch_path.merged(x, (4, 2), 2), merge_windows(x, (4, 2), 2))
    assert moved


def other_layouts():
    x = values((2, 8, 16), torch.bfloat16)
    yield "not a multiple of 16 bytes", values((2, 8, 12), torch.bfloat16)
    yield "an odd address", torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(2, 8, 16)
    yield "rows at odd addresses", values((2, 8, 20), torch.bfloat16)[..., :16]
    yield "no contiguous channels", values((2, 16, 8), torch.bfloat16).transpose(1, 2)
    yield "a pending sign", torch._neg_view(x)


@pytest.mark.parametrize(("name", "x"), other_layouts(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_16_bytes_wide_is_moved_as_it_is(moved, name, x):
    expected = merge_windows(x.clone(), (2, 4), 2)
    assert equal(torch_path.merged(x, (2, 4), 2).resolve_neg(), expected)
    assert not moved


def test_parts_of_a_row_that_are_narrower_than_16_bytes(moved):
    y = values((2, 2, 16), torch.bfloat16)  # four windows of four channels, 8 bytes each
    assert equal(torch_path.unmerged(y, (2, 4), 2), unmerge_windows(y, (2, 4), 2))
    assert not moved
