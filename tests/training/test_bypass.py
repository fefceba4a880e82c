"""If this fails, an eager call pays for the dispatcher, or the ways to the same formulas give different bits, or a
backward leaves the path of its forward."""

import threading

import pytest
import torch
from support.modules import EACH_MODULE, build, draw
from support.recording import Recorder

import stf_kernels
from stf_kernels.ops import autograd, operators

WAYS = pytest.mark.parametrize("way", ["eager", "dispatcher", "compiled"])


class Subclass(torch.Tensor):
    """Nothing but another type, which the bypass must not read past."""


@pytest.fixture
def fused_call(way, monkeypatch):
    """A projector's forward by one of the ways, and the projector."""
    module = build("CompactTokenProjector")
    if way == "dispatcher":
        monkeypatch.setattr(autograd, "is_ordinary", lambda tensors: False)
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True) if way == "compiled" else module, module


def calls_of_everything():
    blocks, x = [torch.randn(2, 16, 4)] * 2, torch.randn(2, 16, 4)
    yield lambda: stf_kernels.concat_linear(blocks, torch.randn(5, 8))
    yield lambda: stf_kernels.spatial_merge_linear(x, torch.randn(5, 16), grid=(4, 4))
    for name in EACH_MODULE.args[1]:
        yield lambda name=name: build(name)(draw(name))


@pytest.mark.parametrize("grad", [True, False])
def test_eager_calls_do_not_reach_the_dispatcher(grad, monkeypatch):
    def fail(*_):
        raise AssertionError("an eager call went through the dispatcher")

    for name in ("concat_linear", "spatial_merge_linear", "token_fusion_mlp", "compact_token_projector"):
        operator = getattr(operators, name)
        monkeypatch.setattr(operator, "_forward_op", fail)
    with torch.set_grad_enabled(grad):
        for call in calls_of_everything():
            call()
    with pytest.raises(AssertionError):  # else the patch above named nothing
        stf_kernels.concat_linear([torch.randn(2, 3, 4)], torch.randn(5, 4).as_subclass(Subclass))


def test_a_subclass_reaches_the_dispatcher():
    with Recorder() as recorder:
        stf_kernels.concat_linear([torch.randn(2, 16, 8)], torch.randn(5, 8).as_subclass(Subclass))
    assert recorder.calls["concat_linear"] == 1


def test_torch_ops_give_the_same_bits():
    module, blocks = build("CompactTokenProjector"), draw("CompactTokenProjector", requires_grad=True)
    layers = [module.mbtf.linear_1, module.mbtf.linear_2, module.stf.linear_1, module.stf.linear_2]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    eager, leaves = module(blocks), [*blocks, *weights, *biases]
    operands = blocks, weights, biases, "gelu", 0, 2, 4, 4
    through = torch.ops.stf_kernels.compact_token_projector(*operands, [True] * len(leaves))[0]
    assert torch.equal(eager, through)
    dy = torch.randn_like(eager)
    mine, others = torch.autograd.grad(eager, leaves, dy), torch.autograd.grad(through, leaves, dy)
    torch.testing.assert_close(mine, others, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(module(blocks), eager)


@WAYS
def test_the_backward_takes_the_path_of_its_forward(fused_call):
    """It may run elsewhere: outside the block, inside another, or in a thread that no block reaches."""
    call, module = fused_call
    with stf_kernels.use_backend("torch"):
        y = call(draw("CompactTokenProjector")).sum()
    failures = []

    def backward():
        try:
            with stf_kernels.use_backend("triton"):  # an error for CPU tensors
                y.backward()
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failures
    assert module.stf.linear_1.weight.grad is not None
    with stf_kernels.use_backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET"):
        call(draw("CompactTokenProjector"))
