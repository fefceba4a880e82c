"""If this fails, recomputing the projector in the backward gives other gradients, or does not recompute."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stf_kernels


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_gradients(reentrant, autocast, hooked):
    module = stf_kernels.CompactTokenProjector(3, 8, 20, skip_tokens=1)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    if hooked:
        module.stf.linear_1.register_forward_hook(lambda *_: None)
    blocks = [torch.randn(2, 17, 8, requires_grad=True) for _ in range(3)]
    leaves = [*blocks, *module.parameters()]
    dy = torch.randn(2, 4, 20)

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
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_nothing_of_the_chain_is_kept():
    module = stf_kernels.CompactTokenProjector(3, 8, 20)
    blocks = [torch.randn(2, 16, 8) for _ in range(3)]
    kept = []
    own = {p.data_ptr() for p in module.parameters()} | {b.data_ptr() for b in blocks}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(blocks)
        plain = [t for t in kept if t.data_ptr() not in own]
        kept.clear()
        checkpoint(module, blocks, use_reentrant=False)
    # pre-activations of both hidden layers and the merged tokens: nothing else is the chain's own
    assert sorted(t.numel() for t in plain) == sorted([2 * 16 * 32, 2 * 4 * 32, 2 * 4 * 128])
