"""If this fails, a module does not survive being copied, pickled, saved, moved or called with other parameters."""

import copy
import io
import pickle

import pytest
import torch

import reference
import stf_kernels

CASES = {
    "mbtf": ("MultiBlockTokenFusion", (3, 8), {}),
    "stf": ("SpatialTokenFusion", (8, 20), {}),
    "projector": ("CompactTokenProjector", (3, 8, 20), {}),
}
BLOCKS = [torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    name, args, options = request.param
    module = getattr(stf_kernels, name)(*args, **options)
    return module, BLOCKS[0] if name == "SpatialTokenFusion" else BLOCKS


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
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


def test_state_dict_saved_with_weights_only(case):
    module, x = case
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    expected = module(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(module(x), expected)


def test_functional_call(case):
    module, x = case
    names = [name for name, _ in module.named_parameters()]
    tensors = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, tensors, (x,))
    other = copy.deepcopy(module)
    other.load_state_dict(tensors)
    torch.testing.assert_close(y, other(x))
    found = torch.autograd.grad(y.sum(), [tensors[name] for name in names])
    expected = torch.autograd.grad(other(x).sum(), list(other.parameters()))
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype(case, dtype):
    module, x = case
    module.to(dtype)
    x = [block.to(dtype) for block in x] if isinstance(x, list) else x.to(dtype)
    y = module(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {dtype}


def test_to_empty_then_load(case):
    module, x = case
    expected, state = module(x), copy.deepcopy(module.state_dict())
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_step_is_seen(case, optimizer):
    module, x = case
    before = module(x)
    module(x).square().sum().backward()
    optimizer(module.parameters(), lr=0.01).step()
    assert not torch.equal(module(x), before)


def test_reference_learns_the_same(case):
    """Five steps of training from one state end in the same place."""
    ours, x = case
    args = next(args for name, args, _ in CASES.values() if name == type(ours).__name__)
    theirs = getattr(reference, type(ours).__name__)(*args)
    theirs.load_state_dict(ours.state_dict())
    target = torch.randn_like(ours(x))
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
