"""If this fails, a region of autocast casts weights more often than for nn.Linear, or a cast outlives its region."""

import pytest
import torch
from support.recording import Recorder
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import reference
import stf_kernels

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def matrix_casts(recorder):
    return sum(name == "_to_copy" and len(shape) == 2 for name, shape, _ in recorder.made)


@pytest.fixture
def pair():
    arguments = (3, 8, 20)
    ours, theirs = stf_kernels.CompactTokenProjector(*arguments), reference.CompactTokenProjector(*arguments)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, [torch.randn(2, 16, 8) for _ in range(3)]


def casts(module, blocks, **options):
    with torch.autocast(**BF16, **options), Recorder() as recorder:
        module(blocks)
        with torch.autocast(**BF16, **options):
            module(blocks)
        module(blocks)
    return matrix_casts(recorder)


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize(("kept", "expected"), [(True, 4), (False, 12)])
def test_as_often_as_for_nn_linear(pair, grad_enabled, kept, expected):
    with torch.set_grad_enabled(grad_enabled):
        counts = [casts(module, pair[2], cache_enabled=kept) for module in pair[:2]]
    assert counts == [expected, expected]


def test_functions():
    blocks, weight = [torch.randn(2, 16, 4)] * 2, torch.nn.Parameter(torch.randn(5, 8))
    merge_weight = torch.nn.Parameter(torch.randn(5, 16))
    with torch.autocast(**BF16), Recorder() as recorder:
        for _ in range(3):
            stf_kernels.concat_linear(blocks, weight)
            stf_kernels.spatial_merge_linear(blocks[0], merge_weight, grid=(4, 4))
    assert matrix_casts(recorder) == 2


def test_a_step_between_two_regions_is_seen(pair):
    ours, theirs, blocks = pair
    optimiser = torch.optim.SGD(ours.parameters(), lr=0.5)
    outputs = []
    for _ in range(3):
        with torch.autocast(**BF16):
            outputs.append(ours(blocks))
        theirs.load_state_dict(ours.state_dict())
        with torch.autocast(**BF16, cache_enabled=False):
            torch.testing.assert_close(ours(blocks), outputs[-1], rtol=0, atol=0)
        outputs[-1].float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("together", [True, False])
def test_gradients_of_two_calls_in_a_region(pair, together):
    ours, theirs, blocks = pair
    other = [block * 2 for block in blocks]
    for module, enabled in ((ours, True), (theirs, False)):
        with torch.autocast(**BF16, enabled=enabled):
            losses = [module(x).float().square().mean() for x in (blocks, other)]
            if not together:
                losses[0].backward()
        (sum(losses) if together else losses[1]).backward()
    for (name, mine), exact in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - exact.grad).norm() <= 0.05 * exact.grad.norm(), name


def test_a_call_without_gradients_first(pair):
    """Its cast is the one that is kept; a gradient must not end at it."""
    ours, _, blocks = pair
    with torch.autocast(**BF16):
        with torch.no_grad():
            ours(blocks)
        ours(blocks).float().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


def test_a_region_in_another_dtype_inside(pair):
    ours, _, blocks = pair
    with torch.autocast(**BF16):
        ours(blocks)
        with torch.autocast("cpu", torch.float16):
            inner = ours(blocks)
        outer = ours(blocks)
    assert inner.dtype == torch.float16
    assert outer.dtype == torch.bfloat16


def test_checkpointing(pair):
    ours, _, blocks = pair
    gradients = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        with torch.autocast(**BF16):
            y = run(blocks)
        gradients.append(torch.autograd.grad(y.float().square().sum(), list(ours.parameters())))
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


def test_a_transform_of_torch_func(pair):
    ours, _, blocks = pair
    parameters = dict(ours.named_parameters())

    def loss(parameters):
        return functional_call(ours, parameters, (blocks,)).float().square().mean()

    with torch.autocast(**BF16):
        ours(blocks)
        found = grad(loss)(parameters)
        expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, other in zip(parameters, expected, strict=True):
        assert (found[name] - other).norm() <= 0.05 * other.norm(), name
