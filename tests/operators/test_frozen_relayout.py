"""If this fails, a channel-major module in eval mode answers from a relaid-out copy of weights it no longer has."""

import copy

import pytest
import torch

import reference
import stf_kernels

X = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(3))
OPTIONS = {"feature_order": "channel_major", "hidden_dim": 12}


@pytest.fixture
def pair():
    theirs = reference.SpatialTokenFusion(4, 5, **OPTIONS).eval().requires_grad_(False)
    ours = stf_kernels.SpatialTokenFusion(4, 5, **OPTIONS).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    ours(X)  # fills whatever it keeps
    return ours, theirs


def assert_same(ours, theirs, x=X):
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_the_copy_is_kept_while_that_is_safe(pair, monkeypatch):
    made, original = [], stf_kernels.modules.channel_to_patch_major
    monkeypatch.setattr(stf_kernels.modules, "channel_to_patch_major", lambda *args: made.append(1) or original(*args))
    pair[0](X)
    pair[0](X)
    assert made == []
    pair[0].train()(X)
    assert made == [1]


def test_after_load_state_dict(pair):
    ours, theirs = pair
    theirs.load_state_dict({key: torch.randn_like(value) for key, value in theirs.state_dict().items()})
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs)


def test_weights_that_come_and_go(pair):
    """A new weight may sit where a freed one sat: an address and a version of zero do not identify it."""
    _, theirs = pair
    size = theirs.linear_1.weight.numel()
    memory = bytearray(4 * size)
    for _ in range(3):
        memory[:] = torch.randn(size).numpy().tobytes()
        state = dict(theirs.named_parameters())
        state["linear_1.weight"] = torch.frombuffer(memory, dtype=torch.float32).view_as(theirs.linear_1.weight)
        found, exact = (torch.func.functional_call(module, state, (X,)) for module in pair)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
        del state


def test_load_by_assignment(pair):
    ours, theirs = pair
    for _ in range(4):
        state = {key: torch.randn_like(value) for key, value in theirs.state_dict().items()}
        for module in pair:
            module.load_state_dict(state, assign=True)
        del state
        assert_same(ours, theirs)


def test_in_place_change(pair):
    for module in pair:
        module.linear_1.weight.mul_(-2)
    assert_same(*pair)


def test_refresh_after_data(pair):
    for module in pair:
        module.linear_1.weight.data.copy_(torch.ones_like(module.linear_1.weight))
    pair[0].refresh()
    assert_same(*pair)


def test_projector_refresh_reaches_the_child():
    ours = stf_kernels.CompactTokenProjector(2, 4, 5, feature_order="channel_major").eval().requires_grad_(False)
    theirs = reference.CompactTokenProjector(2, 4, 5, feature_order="channel_major")
    blocks = [torch.randn(1, 16, 4)] * 2
    ours(blocks)
    ours.stf.linear_1.weight.data.mul_(-3)
    ours.refresh()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(blocks), theirs(blocks), rtol=1e-4, atol=1e-5)


def test_training_after_eval(pair):
    """Trained weights are relaid out on every call: an optimiser's `.data` writes leave no trace."""
    for module in pair:
        module.train().requires_grad_(True)
        module.linear_1.weight.data.mul_(-2)
    assert_same(*pair)


def test_thawed_but_still_in_eval(pair):
    for module in pair:
        module.requires_grad_(True)
        module.linear_1.weight.data.mul_(-2)
    assert_same(*pair)


def test_another_dtype(pair):
    ours, theirs = (module.double() for module in pair)
    assert_same(ours, theirs, X.double())


def test_copies_do_not_share_it(pair):
    ours, theirs = copy.deepcopy(pair)
    for module in (ours, theirs):
        module.linear_1.weight.mul_(-2)
    assert_same(ours, theirs)
    assert_same(*pair)


def test_first_call_under_inference_mode_then_gradients(pair):
    """A copy made under inference mode must not be saved for a backward."""
    ours = copy.deepcopy(pair[0])
    with torch.inference_mode():
        ours(X)
    x = X.clone().requires_grad_()
    ours(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
