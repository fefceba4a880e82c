"""If this fails, an eager call pays for the dispatcher, or the two ways to the same formulas give different bits."""

import pytest
import torch
from support.recording import Recorder

import stf_kernels
from stf_kernels import ops
from stf_kernels.ops import autograd as registration


class Subclass(torch.Tensor):
    """Nothing but another type, which the bypass must not read past."""


@pytest.fixture
def case():
    module = stf_kernels.CompactTokenProjector(3, 8, 20, skip_tokens=1)
    return module, [torch.randn(2, 17, 8) for _ in range(3)]


def functions():
    blocks, weight = [torch.randn(2, 16, 4)] * 2, torch.randn(5, 8)
    x, merge_weight = torch.randn(2, 16, 4), torch.randn(5, 16)
    return {
        "concat_linear": lambda: stf_kernels.concat_linear(blocks, weight),
        "spatial_merge_linear": lambda: stf_kernels.spatial_merge_linear(x, merge_weight, grid=(4, 4)),
    }


@pytest.mark.parametrize("grad", [True, False])
def test_eager_calls_do_not_reach_the_dispatcher(case, grad, monkeypatch):
    module, blocks = case

    def fail(*_):
        raise AssertionError("an eager call went through the dispatcher")

    for operator in (ops.concat_linear, ops.spatial_merge_linear, ops.token_fusion_mlp, ops.compact_token_projector):
        monkeypatch.setattr(operator, "_forward_op", fail)
    with torch.set_grad_enabled(grad):
        module(blocks)
        module.mbtf(blocks)
        module.stf(torch.randn(2, 16, 8))
        for call in functions().values():
            call()


def test_the_recorder_would_see_it(case):
    """The patch above must name the way that the dispatcher path takes."""
    _, blocks = case
    with Recorder() as recorder:
        stf_kernels.concat_linear(blocks, torch.randn(5, 24).as_subclass(Subclass))
    assert recorder.calls["concat_linear"] == 1


def test_both_ways_give_the_same_bits(case):
    module, blocks = case
    blocks = [block.requires_grad_() for block in blocks]
    layers = [module.mbtf.linear_1, module.mbtf.linear_2, module.stf.linear_1, module.stf.linear_2]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    eager = module(blocks)
    needs = [True] * (len(blocks) + len(weights) + len(biases))
    through = torch.ops.stf_kernels.compact_token_projector(blocks, weights, biases, "gelu", 1, 2, 4, 4, needs)[0]
    assert torch.equal(eager, through)
    leaves, dy = [*blocks, *weights, *biases], torch.randn_like(eager)
    for mine, other in zip(
        torch.autograd.grad(eager, leaves, dy), torch.autograd.grad(through, leaves, dy), strict=True
    ):
        assert torch.equal(mine, other)
    with torch.no_grad():
        assert torch.equal(module(blocks), eager)


@pytest.mark.parametrize("way", ["bypass", "dispatcher"])
def test_the_backward_takes_the_path_of_its_forward(case, way, monkeypatch):
    """It may run elsewhere: outside the block, or in a thread that the block does not reach."""
    module, blocks = case
    monkeypatch.setenv("STF_KERNELS_BACKEND", "triton")  # an error for CPU tensors
    if way == "dispatcher":
        monkeypatch.setattr(registration, "is_ordinary", lambda tensors: False)
    with stf_kernels.use_backend("torch"):
        y = module(blocks).sum()
    y.backward()
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        module(blocks)
