"""If this fails, a frozen tower pays for dX or a frozen projector for dW, the chain keeps tensors that no wanted
gradient reads, or a gradient is wrong for want of one."""

import pytest
import torch
from support.recording import Recorder

import reference
import stf_kernels
from stf_kernels.ops import autograd

BATCH, COUNT, DIM, OUT = 2, 3, 8, 20
LAYERS = ("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2")
# elements of what a backward may read
BLOCKS = COUNT * BATCH * 16 * DIM
U, V, H = BATCH * 16 * 4 * DIM, BATCH * 16 * DIM, BATCH * 4 * 16 * DIM
W1, W2, W3, W4 = 4 * DIM * COUNT * DIM, DIM * 4 * DIM, 16 * DIM * 4 * DIM, OUT * 16 * DIM
DW1, DX1 = 1, COUNT  # products: one, and one a segment

CASES = {
    # prefixes of the parameters trained, number of blocks trained -> elements kept, products of the backward
    "all": (LAYERS, 3, BLOCKS + 2 * U + V + 2 * H + W1 + W2 + W3 + W4, DX1 + DW1 + 3 + 3),
    "frozen-tower": (LAYERS, 0, BLOCKS + 2 * U + V + 2 * H + W2 + W3 + W4, DW1 + 3 + 3),
    "frozen-projector": ((), 3, U + H + W1 + W2 + W3 + W4, DX1 + 3),
    "one-block": ((), 1, U + H + W1 + W2 + W3 + W4, 1 + 3),
    "last-layer": (("stf.linear_2",), 0, H, 1),
    "last-bias": (("stf.linear_2.bias",), 0, 0, 0),
    "stf": (("stf",), 0, V + 2 * H + W4, 2 + 1),
    "third-layer": (("stf.linear_1",), 0, V + H + W4, 1 + 1),
    "third-bias": (("stf.linear_1.bias",), 0, H + W4, 1),
    "second-weight": (("mbtf.linear_2.weight",), 0, U + H + W3 + W4, 1 + 2),
    "first-bias": (("mbtf.linear_1.bias",), 0, U + H + W2 + W3 + W4, 3),
    "first-weight": (("mbtf.linear_1.weight",), 0, BLOCKS + U + H + W2 + W3 + W4, DW1 + 3),
}


def kept_by(call):
    """(what it returns, the number of elements saved for its backward)"""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        return call(), sum(kept)


def products_of(call):
    """Matrix products; the profiler also sees those inside an operator of our own, which a dispatch mode does not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("way", ["eager", "dispatcher"])
@pytest.mark.parametrize(("trained", "count", "elements", "products"), CASES.values(), ids=CASES)
def test_kept_computed_and_right(trained, count, elements, products, way, monkeypatch):
    if way == "dispatcher":
        monkeypatch.setattr(autograd, "is_ordinary", lambda tensors: False)
    ours, theirs = (p.CompactTokenProjector(COUNT, DIM, OUT, dtype=torch.float64) for p in (stf_kernels, reference))
    theirs.load_state_dict(ours.state_dict())
    data = [torch.randn(BATCH, 16, DIM, dtype=torch.float64) for _ in range(COUNT)]
    gradients, dy = [], torch.randn(BATCH, 4, OUT, dtype=torch.float64)
    for module in (ours, theirs):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(trained)))
        blocks = [x.clone().requires_grad_(i < count) for i, x in enumerate(data)]
        y, kept = kept_by(lambda module=module, blocks=blocks: module(blocks))
        found = products_of(lambda y=y: y.backward(dy))
        if module is ours:
            assert (kept, found) == (elements, products)
        gradients.append([leaf.grad for leaf in (*module.parameters(), *blocks)])
    torch.testing.assert_close(*gradients)  # and None where there is None


def test_activations_are_kept_and_computed_where_a_gradient_reads_them():
    """A kept pre-activation is not overwritten by its activation; a bias alone needs no activated copy."""
    module, blocks = stf_kernels.CompactTokenProjector(COUNT, DIM, OUT), [torch.randn(2, 16, DIM)] * COUNT
    for grad in (True, False):
        with Recorder() as recorder, torch.set_grad_enabled(grad):
            assert module(blocks).requires_grad == grad
        assert (recorder.calls["gelu"], recorder.calls["gelu_"]) == ((2, 0) if grad else (0, 2))
    module.requires_grad_(False).stf.linear_2.bias.requires_grad_()
    y = module(blocks)
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    assert not any("gelu" in name for name in recorder.calls)


def test_what_is_not_kept_may_change():
    """In place, between forward and backward: as the operands of frozen nn.Linear layers may."""
    module = stf_kernels.CompactTokenProjector(COUNT, DIM, OUT).requires_grad_(False)
    module.stf.linear_2.weight.requires_grad_()
    blocks = [torch.randn(BATCH, 16, DIM) for _ in range(COUNT)]
    y = module(blocks)
    expected = torch.autograd.grad(y.sum(), module.stf.linear_2.weight, retain_graph=True)[0]
    blocks[0].zero_()
    module.mbtf.linear_1.weight.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), module.stf.linear_2.weight)[0], expected)


def test_part_of_what_was_kept_for():
    """autograd.grad of some inputs: the rest is not computed, and what was kept for it is not mistaken for another."""
    module = stf_kernels.CompactTokenProjector(COUNT, DIM, OUT, dtype=torch.float64)
    blocks = [torch.randn(BATCH, 16, DIM, dtype=torch.float64) for _ in range(COUNT)]
    leaves = list(module.parameters())
    whole = torch.autograd.grad(module(blocks).square().sum(), leaves)
    for i, leaf in enumerate(leaves):
        [alone] = torch.autograd.grad(module(blocks).square().sum(), leaf)
        assert torch.equal(alone, whole[i])
