"""If this fails, plain torch copies what it need not (fp32 on a CPU), copies slowly (on a GPU), or copies other values
than there are.
"""

import pytest
import torch
from support.recording import Recorder

import reference
import stf_kernels
from bench.meters import peak_bytes
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


def test_no_unfold_of_a_merge():
    x, weight = torch.randn(4, 64, 16), torch.randn(5, 4 * 16)
    largest = {}
    for package in (reference, stf_kernels):
        with Recorder() as recorder:
            package.spatial_merge_linear(x, weight, grid=(8, 8))
        largest[package] = recorder.largest
    assert largest[reference] == x.numel()  # or the test sees nothing
    assert largest[stf_kernels] < x.numel()


def test_beside_a_cpu_a_stage_is_one_product():
    """Where every part of a sum would be a launch and a pass over the result."""
    for device, products in (("cpu", 3), ("meta", 1)):
        blocks, weight = [torch.ones(2, 9, 4, device=device)] * 3, torch.ones(5, 12, device=device)
        with Recorder() as recorder:
            stf_kernels.concat_linear(blocks, weight, weight[:, 0], skip_tokens=1)
        assert recorder.matrix_products() == products


def test_peak_memory():
    """At LLaVA-1.5's proportions, the tower frozen: less than the reference's by the concatenation."""
    blocks = [torch.randn(8, 24 * 24 + 1, 32) for _ in range(8)]
    concatenation = 8 * 576 * 8 * 32 * 4

    def peaks(package):
        module = package.CompactTokenProjector(8, 32, 128, skip_tokens=1)
        with torch.no_grad():
            inference = peak_bytes(lambda: module(blocks), "cpu")[1]
        forward = peak_bytes(lambda: module(blocks).square().mean(), "cpu")[1]  # with all that a backward will read
        leaves = list(module.parameters())
        step = peak_bytes(lambda: torch.autograd.grad(module(blocks).square().mean(), leaves), "cpu")[1]
        return inference, forward, step

    (inference, forward, step), theirs = peaks(stf_kernels), peaks(reference)
    assert theirs[0] - inference >= concatenation // 2
    assert theirs[2] - step >= concatenation
    # the backward frees what it has passed before it takes more
    assert step - forward < theirs[2] - theirs[1]
