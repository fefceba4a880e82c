"""If this fails, a module does not survive being copied, pickled, saved, trained or called with other parameters."""

import copy
import io
import pickle

import pytest
import torch
from support.modules import EACH_MODULE, build, draw, same_state


@pytest.fixture
def case(name):
    return build(name), draw(name)


def saved_and_loaded(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": lambda module: saved_and_loaded(module, weights_only=False),
}


@EACH_MODULE
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_copies(case, way, used):
    module, x = case
    module.eval().requires_grad_(False)
    if used:
        module(x)
    other = way(module)
    assert torch.equal(other(x), module(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any()
    assert module(x).any()
    assert repr(other) == repr(module)


@EACH_MODULE
@pytest.mark.parametrize("way", ["saved", "to_empty"])
def test_a_state_dict_brings_the_values_back(case, way):
    module, x = case
    expected, state = module(x), saved_and_loaded(module.state_dict(), weights_only=True)
    if way == "to_empty":
        module.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.load_state_dict(state)
    assert torch.equal(module(x), expected)


@EACH_MODULE
def test_functional_call(case):
    module, x = case
    tensors = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, tensors, (x,))
    other = copy.deepcopy(module)
    other.load_state_dict(tensors)
    expected = other(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.sum(), list(tensors.values()))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), list(other.parameters())))


@EACH_MODULE
def test_the_reference_learns_the_same(name):
    """Five steps of training from one state end in the same place."""
    modules, x = same_state(name), draw(name)
    target = torch.randn_like(modules[0](x))
    for module in modules:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
    ours, theirs = (list(module.parameters()) for module in modules)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
