"""If this fails, the way from a call to its kernel has grown longer, reads the environment, makes a copy or is another
backend's."""

import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
from support.modules import ARGUMENTS, build, draw

import stf_kernels
from stf_kernels.kernels import segmented_linear
from stf_kernels.ops import autograd, launch

PACKAGE = str(Path(stf_kernels.__file__).parent)


class Kernel:
    """In the kernel's place: notes what every launch was given, and who called it."""

    def __init__(self, real):
        self.real, self.runs, self.running, self.launches, self.callers = real, True, False, [], []
        self.arg_names = real.arg_names

    def __getitem__(self, grid):
        def run(*arguments, **options):
            frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
            self.callers.append([f.f_code.co_name for f in frames if f.f_code.co_filename.startswith(PACKAGE)])
            self.launches.append(arguments)
            self.running = True
            if self.runs:
                self.real[grid](*arguments, **options)
            self.running = False

        return run


@pytest.fixture
def kernel(monkeypatch):
    spy = Kernel(segmented_linear._segmented_linear_fwd_kernel)
    monkeypatch.setattr(segmented_linear, "_segmented_linear_fwd_kernel", spy)
    return spy


def make_call(what, grad):
    if what == "concat_linear":
        weight = torch.randn(5, 24, requires_grad=grad)
        return lambda: stf_kernels.concat_linear(draw("MultiBlockTokenFusion"), weight, activation="gelu")
    if what == "out":
        module, out = build("CompactTokenProjector").requires_grad_(False), torch.zeros(8, 20)
        return lambda: module(draw("CompactTokenProjector"), out=out, rows=torch.arange(8))
    module = build(what).requires_grad_(grad)
    return lambda: module(draw(what))


EACH_CALL = pytest.mark.parametrize("what", ["concat_linear", "out", *ARGUMENTS])


@pytest.mark.parametrize("way", ["eager", "dispatcher"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@EACH_CALL
def test_frames_between_a_call_and_its_kernel(what, grad, way, kernel, monkeypatch):
    """Function or module, operator, chain, launch, kernel; one more where autograd, torch.library or `out` asks."""
    if way == "dispatcher":
        monkeypatch.setattr(autograd, "is_ordinary", lambda tensors: False)
    limit = 5 if what != "out" and not grad and way == "eager" else 6
    make_call(what, grad)()
    assert kernel.callers
    for callers in kernel.callers:
        assert "run_stage" in callers
        assert ("_forward" in callers) == (way == "dispatcher" and what != "out"), callers
        assert len(callers) + 1 <= limit, callers  # and the kernel's own


@EACH_CALL
def test_the_environment_is_not_read(what, kernel, monkeypatch):
    """After the first call; what Triton's interpreter reads to run a kernel is not ours."""
    call = make_call(what, True)
    call()
    read, original = [], type(os.environ).__getitem__

    def getitem(environment, name):
        if not kernel.running:
            read.append(name)
        return original(environment, name)

    monkeypatch.setattr(type(os.environ), "__getitem__", getitem)
    os.environ.get("HOME")
    assert read == ["HOME"]  # or the test sees nothing
    launches = len(kernel.launches)
    call()
    assert len(kernel.launches) > launches
    assert read == ["HOME"]


@pytest.mark.parametrize("way", ["eager", "dispatcher", "compiled"])
def test_a_backward_is_plain_torch_and_each_call_asks_for_its_backend(way, monkeypatch):
    """A graph holds none; the backward, which CUDA runs in a thread that sees no block of the caller, needs none."""
    module, launches = build("CompactTokenProjector"), []
    x = [block[:, 1:] for block in draw("CompactTokenProjector", tokens=17)]
    real = launch.run_stage
    monkeypatch.setattr(launch, "run_stage", lambda *a, **k: launches.append(1) or real(*a, **k))
    if way == "dispatcher":
        monkeypatch.setattr(autograd, "is_ordinary", lambda tensors: False)
    torch._dynamo.reset()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if way == "compiled" else module
    for backend in ("torch", "triton", "torch"):
        launches.clear()
        with stf_kernels.use_backend(backend):
            y = call(x).sum()
        assert len(launches) == (4 if backend == "triton" else 0)
        y.backward()  # under "triton"
        assert len(launches) == (4 if backend == "triton" else 0)
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_an_fp32_out_under_autocast_is_written_itself(kernel, monkeypatch):
    """A GPU's kernel stores into any dtype; a copy to 16 bit and back would round the rows of the text."""
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    kernel.runs = False  # it would be asked for instructions that the interpreter has not
    out = torch.randn(9, 20)
    before, rows = out.clone(), torch.tensor([8, 0, 3, 5])
    module = build("CompactTokenProjector").requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        module(draw("CompactTokenProjector", batch=1), out=out, rows=rows)
    assert kernel.launches[-1][3] is out
    others = torch.ones(9, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(out[others], before[others])
