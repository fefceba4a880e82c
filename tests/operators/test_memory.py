"""If this fails, fp32 pays on a CPU for a concatenation or an unfold copy, or elsewhere for going without."""

import torch
from support.recording import Recorder

import reference
import stf_kernels
from bench.meters import peak_bytes


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
