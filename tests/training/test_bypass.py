"""If this fails, an eager call pays for the dispatcher, or a backward leaves the path of its forward."""

import threading

import pytest
import torch
from support.modules import EACH_MODULE, build, draw

import stf_kernels
from stf_kernels.ops import autograd, operators


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
    subclass = type("Subclass", (torch.Tensor,), {})
    with pytest.raises(AssertionError):  # a subclass does; else the patch above would name nothing
        stf_kernels.concat_linear([torch.randn(2, 3, 4)], torch.randn(5, 4).as_subclass(subclass))


@pytest.mark.parametrize("way", ["eager", "dispatcher", "compiled"])
def test_the_backward_takes_the_path_of_its_forward(way, monkeypatch):
    """It may run elsewhere: outside the block, inside another, or in a thread that no block reaches."""
    module = build("CompactTokenProjector")
    if way == "dispatcher":
        monkeypatch.setattr(autograd, "is_ordinary", lambda tensors: False)
    torch._dynamo.reset()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if way == "compiled" else module
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
