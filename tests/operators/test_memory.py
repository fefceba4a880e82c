"""If this fails, fp32 pays for what the library promises to avoid: a concatenation or an unfold copy."""

import pytest
import torch
from support.recording import Recorder

import reference
import stf_kernels

BATCH, GRID, DIM, COUNT = 4, (8, 8), 16, 8
TOKENS = GRID[0] * GRID[1]
CONCATENATION = BATCH * TOKENS * COUNT * DIM


def projector(package):
    # hidden widths below the concatenation's, so that nothing else is as large as it
    return package.CompactTokenProjector(COUNT, DIM, 24, mbtf_hidden_dim=32, stf_hidden_dim=32, skip_tokens=1)


def blocks(grad=False):
    return [torch.randn(BATCH, TOKENS + 1, DIM, requires_grad=grad) for _ in range(COUNT)]


def recorded(package, *, backward=False):
    module, inputs = projector(package), blocks()
    with Recorder() as recorder, torch.set_grad_enabled(backward):
        y = module(inputs, GRID)
        if backward:
            y.sum().backward()
    return recorder


def test_no_concatenation_forward():
    assert recorded(reference).largest() == CONCATENATION  # or the test sees nothing
    assert recorded(stf_kernels).largest() < CONCATENATION


def test_no_concatenation_forward_and_backward():
    assert recorded(reference, backward=True).largest() == CONCATENATION
    assert recorded(stf_kernels, backward=True).largest() < CONCATENATION


def test_no_unfold_of_a_merge():
    x, weight = torch.randn(BATCH, TOKENS, DIM), torch.randn(5, 4 * DIM)
    unfold = x.numel()
    sizes = {}
    for package in (reference, stf_kernels):
        with Recorder() as recorder:
            package.spatial_merge_linear(x, weight, grid=GRID)
        sizes[package.__name__] = recorder.largest()
    assert sizes["reference"] == unfold
    assert sizes["stf_kernels"] < unfold


def test_no_concatenation_when_a_later_layer_is_wrapped():
    module = projector(stf_kernels)
    module.stf.linear_2.register_forward_hook(lambda *_: None)
    with Recorder() as recorder, torch.no_grad():
        module(blocks(), GRID)
    assert recorder.largest() < CONCATENATION


def peak(package, *, backward):
    """Bytes held at the worst moment, at LLaVA-1.5's proportions with a 32nd of the channels; without parameters."""
    module = package.CompactTokenProjector(8, 32, 128, skip_tokens=1)
    inputs = [torch.randn(8, 24 * 24 + 1, 32) for _ in range(8)]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profile, torch.set_grad_enabled(backward):
        y = module(inputs)
        if backward:
            y.backward(torch.ones_like(y))
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
def test_peak_memory(backward):
    """Below the reference's by the bytes of the concatenation and, with the tower frozen, of the unfold."""
    ours, theirs = peak(stf_kernels, backward=backward), peak(reference, backward=backward)
    concatenation, unfold = 8 * 576 * 8 * 32 * 4, 8 * 576 * 32 * 4
    assert ours > 0
    assert theirs - ours >= concatenation // 2 if not backward else theirs - ours >= concatenation + unfold
