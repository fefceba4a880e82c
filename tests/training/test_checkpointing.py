"""If this fails, recomputing the projector in the backward gives other gradients, or does not recompute."""

import pytest
import torch
from support.modules import build, draw
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_gradients(reentrant, autocast, hooked):
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


def test_nothing_of_the_chain_is_kept():
    module, blocks = build("CompactTokenProjector"), draw("CompactTokenProjector")
    kept = []
    own = {p.data_ptr() for p in module.parameters()} | {b.data_ptr() for b in blocks}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        checkpoint(module, blocks, use_reentrant=False)
        kept = [t for t in kept if t.numel()]  # torch 2.11's checkpoint keeps an empty one
        assert all(t.data_ptr() in own for t in kept)
        module(blocks)
    # pre-activations of both hidden layers and the merged tokens: nothing else is the chain's own
    chains = [t.numel() for t in kept if t.data_ptr() not in own]
    assert sorted(chains) == sorted([2 * 16 * 32, 2 * 4 * 32, 2 * 4 * 128])
