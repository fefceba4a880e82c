"""If this fails, fp32 pays for what the library promises to avoid: a concatenation or an unfold copy."""

import pytest
import torch
from support.recording import Recorder

import reference
import stf_kernels

BATCH, GRID, DIM, COUNT = 4, (8, 8), 16, 8
TOKENS = GRID[0] * GRID[1]


def largest(call):
    with Recorder() as recorder:
        call()
    return recorder.largest


@pytest.mark.parametrize("wrapped", [False, True], ids=["chain", "hooked"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
def test_no_concatenation(backward, wrapped):
    blocks, concatenation = [torch.randn(BATCH, TOKENS + 1, DIM) for _ in range(COUNT)], BATCH * TOKENS * COUNT * DIM
    # hidden widths below the concatenation's, so that nothing else is as large as it
    options = {"mbtf_hidden_dim": 32, "stf_hidden_dim": 32, "skip_tokens": 1}
    modules = [package.CompactTokenProjector(COUNT, DIM, 24, **options) for package in (reference, stf_kernels)]
    if wrapped:
        modules[1].stf.linear_2.register_forward_hook(lambda *_: None)

    def call(module):
        with torch.set_grad_enabled(backward):
            y = module(blocks, GRID)
        if backward:
            y.sum().backward()

    theirs, ours = (largest(lambda m=m: call(m)) for m in modules)
    assert theirs == concatenation  # or the test sees nothing
    assert ours < concatenation


def test_no_unfold_of_a_merge():
    x, weight = torch.randn(BATCH, TOKENS, DIM), torch.randn(5, 4 * DIM)
    packages = reference, stf_kernels
    theirs, ours = (largest(lambda p=p: p.spatial_merge_linear(x, weight, grid=GRID)) for p in packages)
    assert theirs == x.numel()
    assert ours < x.numel()


def peak_bytes(call):
    """The highest running sum of what torch's CPU allocator hands out and gets back."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profile:
        call()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_peak_memory():
    """At LLaVA-1.5's proportions, the tower frozen: less than the reference's by the copies that are not made."""
    blocks = [torch.randn(8, 24 * 24 + 1, 32) for _ in range(8)]
    concatenation, unfold = 8 * 576 * 8 * 32 * 4, 8 * 576 * 32 * 4

    def peaks(package):
        module = package.CompactTokenProjector(8, 32, 128, skip_tokens=1)
        with torch.no_grad():
            inference = peak_bytes(lambda: module(blocks))
        forward = peak_bytes(lambda: module(blocks).square().mean())  # with all that a backward will read
        step = peak_bytes(lambda: torch.autograd.grad(module(blocks).square().mean(), list(module.parameters())))
        return inference, forward, step

    (inference, forward, step), theirs = peaks(stf_kernels), peaks(reference)
    assert theirs[0] - inference >= concatenation // 2
    assert theirs[2] - step >= concatenation + unfold
    assert step <= 1.05 * forward  # the backward frees what it has passed before it takes more
