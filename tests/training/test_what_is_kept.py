"""If this fails, the chain keeps tensors that no wanted gradient reads, or a gradient is wrong for want of one."""

import pytest
import torch

import reference
import stf_kernels
from bench.memory import peak_bytes
from bench.problems import Sizes, random_blocks
from stf_kernels.ops import autograd as registration

BATCH, COUNT, DIM, OUT = 2, 3, 8, 20
LAYERS = ("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2")
ALL = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
# elements of what a backward may read
BLOCKS = COUNT * BATCH * 16 * DIM
U, V, H = BATCH * 16 * 4 * DIM, BATCH * 16 * DIM, BATCH * 4 * 16 * DIM
W1, W2, W3, W4 = 4 * DIM * COUNT * DIM, DIM * 4 * DIM, 16 * DIM * 4 * DIM, OUT * 16 * DIM

CASES = {
    # parameters trained, blocks trained -> elements kept
    "all": (ALL, True, BLOCKS + U + V + H + W1 + W2 + W3 + W4),
    "frozen-tower": (ALL, False, BLOCKS + U + V + H + W2 + W3 + W4),
    "frozen-projector": ((), True, U + H + W1 + W2 + W3 + W4),
    "last-layer": (("stf.linear_2.weight", "stf.linear_2.bias"), False, H),
    "last-bias": (("stf.linear_2.bias",), False, 0),
    "stf": (tuple(name for name in ALL if name.startswith("stf")), False, V + H + W4),
    "third-bias": (("stf.linear_1.bias",), False, H + W4),
    "second-layer": (("mbtf.linear_2.weight",), False, U + H + W3 + W4),
    "first-bias": (("mbtf.linear_1.bias",), False, U + H + W2 + W3 + W4),
    "first-weight": (("mbtf.linear_1.weight",), False, BLOCKS + U + H + W2 + W3 + W4),
}


@pytest.mark.parametrize("way", ["bypass", "dispatcher"])
@pytest.mark.parametrize(("trained", "blocks", "elements"), CASES.values(), ids=CASES)
def test_kept_and_right(trained, blocks, elements, way, monkeypatch):
    if way == "dispatcher":
        monkeypatch.setattr(registration, "is_ordinary", lambda tensors: False)
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    modules = [cls(COUNT, DIM, OUT, dtype=torch.float64) for cls in classes]
    modules[1].load_state_dict(modules[0].state_dict())
    data = [torch.randn(BATCH, 16, DIM, dtype=torch.float64) for _ in range(COUNT)]
    gradients, kept = [], []

    def note(x):
        kept.append(x.numel())
        return x

    for module in modules:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        inputs = [x.clone().requires_grad_(blocks) for x in data]
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = module(inputs)
        if module is modules[0]:
            assert sum(kept) == elements
        y.square().sum().backward()
        gradients.append([p.grad for p in module.parameters()] + [x.grad for x in inputs])
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


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


def test_the_peak_of_a_training_step():
    """Narrow and with many tokens, so that activations are nearly all of it; the tower is frozen."""
    sizes, batch = Sizes(dim=32, out_dim=64), 8
    blocks = random_blocks(sizes, batch, device="cpu", dtype=torch.float32, seed=1)
    peaks = {}
    for package in (stf_kernels, reference):
        module = package.CompactTokenProjector(sizes.blocks, sizes.dim, sizes.out_dim, skip_tokens=1)

        def step(module=module):
            return torch.autograd.grad(module(blocks).square().mean(), list(module.parameters()))

        step()
        peaks[package.__name__] = peak_bytes(step, "cpu")[1]
        if package is stf_kernels:
            _, forward = peak_bytes(lambda module=module: module(blocks), "cpu")
    assert peaks["reference"] - peaks["stf_kernels"] >= sizes.copied_bytes(batch, 4)
    assert peaks["stf_kernels"] <= 1.05 * forward  # the backward frees what it has passed before it takes more
