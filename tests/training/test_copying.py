"""If this fails, a module does not survive being copied, pickled, saved or checkpointed, or a step does not follow from
the one before it: two runs of it differ, or gradients do not add up."""

import copy
import io

import pytest
import torch
from support.modules import EACH_MODULE, build, draw, flat
from torch.utils.checkpoint import checkpoint


def saved_and_loaded(value, weights_only=False):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@EACH_MODULE
@pytest.mark.parametrize("way", [copy.deepcopy, saved_and_loaded])
def test_copies(name, way):
    """By copying or pickling."""
    module, x = build(name).requires_grad_(False), draw(name)
    y, other = module(x), way(module)
    assert torch.equal(other(x), y)
    for parameter in other.parameters():
        parameter.zero_()
    assert not other(x).any()
    assert torch.equal(module(x), y)
    assert repr(other) == repr(module)


@EACH_MODULE
@pytest.mark.parametrize("way", ["saved", "to_empty"])
def test_a_state_dict_brings_the_values_back(name, way):
    module, x = build(name).requires_grad_(False), draw(name)
    expected, state = module(x), saved_and_loaded(module.state_dict(), weights_only=True)
    if way == "to_empty":
        module.to("meta").to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.zero_()
    module.load_state_dict(state)
    assert torch.equal(module(x), expected)


@EACH_MODULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_give_the_same_bits_and_gradients_accumulate(name, dtype):
    module, x = build(name, dtype=dtype), draw(name, batch=3, dtype=dtype, requires_grad=True)
    leaves, runs = [*flat(x), *module.parameters()], []
    for _ in range(2):
        y = module(x)
        for retain_graph in (True, False):
            runs.append([y, *torch.autograd.grad(y.sum(), leaves, retain_graph=retain_graph)])
    for again in runs[1:]:
        assert all(map(torch.equal, runs[0], again))
    for _ in range(2):
        module(x).sum().backward()
    assert all(torch.equal(leaf.grad, 2 * once) for leaf, once in zip(leaves, runs[0][1:], strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_checkpointing_recomputes_the_same_gradients(reentrant, autocast, hooked):
    module, blocks = build("CompactTokenProjector"), draw("CompactTokenProjector", requires_grad=True)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    if hooked:
        module.stf.linear_1.register_forward_hook(lambda *_: None)
    leaves, dy = [*blocks, *module.parameters()], torch.randn(2, 4, 20)

    def step(call):
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call()
        y.float().backward(dy)
        return [y, *(leaf.grad for leaf in leaves)]

    plain = step(lambda: module(blocks))
    assert len(calls) == 1
    again = step(lambda: checkpoint(lambda *b: module(list(b)), *blocks, use_reentrant=reentrant))
    assert len(calls) == 3
    assert all(map(torch.equal, plain, again))
