"""If this fails, the way from a call to its kernel has grown longer, reads the environment, makes a copy or is another
backend's, or a launch is repeated with operands that lie otherwise."""

import functools
import os
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from support.modules import ARGUMENTS, build, draw
from torch import zeros

import stf_kernels
from stf_kernels.configs import GemmConfig
from stf_kernels.kernels import segmented_linear
from stf_kernels.ops import autograd, launch
from stf_kernels.ops.segments import Stage

NAME = "_segmented_linear_fwd_kernel"
PACKAGE = str(Path(stf_kernels.__file__).parent)


class Kernel:
    """In the kernel's place: notes every launch, and who called it. `compiled` is what a launch on a GPU returns."""

    def __init__(self, real, compiled=None):
        self.real, self.arg_names, self.compiled = real, real.arg_names, compiled
        self.launches, self.callers, self.runs, self.running = [], [], True, False

    def __getitem__(self, grid):
        def run(*arguments, **options):
            frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1))]
            self.callers.append([f.f_code.co_name for f in frames if f.f_code.co_filename.startswith(PACKAGE)])
            self.launches.append((arguments, options))
            self.running = True
            if self.runs:
                self.real[grid](*arguments, **options)
            self.running = False
            return self.compiled

        return run


@pytest.fixture
def kernel(monkeypatch):
    spy = Kernel(getattr(segmented_linear, NAME))
    monkeypatch.setattr(segmented_linear, NAME, spy)
    return spy


def concat_linear(grad):
    weight = torch.randn(5, 24, requires_grad=grad)
    return lambda: stf_kernels.concat_linear(draw("MultiBlockTokenFusion"), weight, activation="gelu")


def module_call(name):
    def make(grad):
        module = build(name).requires_grad_(grad)
        return lambda: module(draw(name))

    return make


def into_out(grad):
    module, out = build("CompactTokenProjector").requires_grad_(False), zeros(8, 20)
    return lambda: module(draw("CompactTokenProjector"), out=out, rows=torch.arange(8))


CALLS = {"concat_linear": concat_linear, "out": into_out, **{name: module_call(name) for name in ARGUMENTS}}


@pytest.mark.parametrize("way", ["eager", "dispatcher"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_frames_between_a_call_and_its_kernel(make, grad, way, kernel, monkeypatch):
    """Function or module, operator, chain, launch, kernel; one more where autograd, torch.library or `out` asks."""
    if way == "dispatcher":
        monkeypatch.setattr(autograd, "is_ordinary", lambda tensors: False)
    limit = 5 if make is not into_out and not grad and way == "eager" else 6
    make(grad)()
    assert kernel.callers
    for callers in kernel.callers:
        assert "run_stage" in callers
        assert len(callers) + 1 <= limit, callers  # and the kernel's own


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_the_environment_is_not_read(make, kernel, monkeypatch):
    """After the first call; what Triton's interpreter reads to run a kernel is not ours."""
    call = make(True)
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_backward_in_another_thread_takes_the_backend_of_its_forward(compiled, monkeypatch):
    """As CUDA's does, where no block of the caller is seen; a graph is compiled once a backend."""
    module, x, launches = build("CompactTokenProjector"), draw("CompactTokenProjector"), []
    for name in ("run_stage", "run_activation_bwd"):
        real = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, _r=real, _n=name, **k: launches.append(_n) or _r(*a, **k))
    torch._dynamo.reset()
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    for backend in ("torch", "triton", "torch"):
        launches.clear()
        with stf_kernels.use_backend(backend):
            y = call(x).sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
        assert set(launches) == ({"run_stage", "run_activation_bwd"} if backend == "triton" else set())


def test_an_fp32_out_under_autocast_is_written_itself(kernel, monkeypatch):
    """A GPU's kernel stores into any dtype; a copy to 16 bit and back would round the rows of the text."""
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    kernel.runs = False  # it would be asked for instructions that the interpreter has not
    out = torch.randn(9, 20)
    before, rows = out.clone(), torch.tensor([8, 0, 3, 5])
    module = build("CompactTokenProjector").requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        module(draw("CompactTokenProjector", batch=1), out=out, rows=rows)
    assert kernel.launches[-1][0][3] is out
    others = torch.ones(9, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(out[others], before[others])


INDEXED = {
    "blocks": [zeros(2, 8, 16)] * 2,
    "weight": zeros(6, 32),
    "bias": zeros(6),
    "stage": Stage("gelu"),
    "out": zeros(20, 6),
    "rows": torch.arange(16),
}
HALF = {name: INDEXED[name].half() for name in ("weight", "bias", "out")} | {"blocks": [zeros(2, 8, 16).half()] * 2}
OTHER = {
    "tokens": {"blocks": [zeros(2, 4, 16)] * 2, "rows": torch.arange(8)},
    "batch": {"blocks": [zeros(1, 8, 16)] * 2, "rows": torch.arange(8)},
    "columns": {"weight": zeros(5, 32), "bias": zeros(5), "out": zeros(20, 6)[:, :5]},
    "block-strides": {"blocks": [zeros(2, 8, 16), zeros(2, 8, 32)[..., :16]]},
    "block-address": {"blocks": [zeros(2, 8, 16), zeros(257)[1:].view(2, 8, 16)]},
    "dtype": HALF,
    "weight-stride": {"weight": zeros(6, 40)[:, :32]},
    "no-bias": {"bias": None},
    "no-out": {"out": None, "rows": None},
    "out-rows": {"out": zeros(17, 6)},
    "out-stride": {"out": zeros(20, 8)[:, :6]},
    "out-dtype": {"out": zeros(20, 6).half()},
    "bias-dtype": {"bias": zeros(6).half()},
    "stage": {"stage": Stage("silu")},
    "configuration": {"config": GemmConfig(16, 16, 16)},
    "save_pre": {"save_pre": True},
    "forced": {"forced": True},
    "precision": {},
}


@pytest.fixture
def repeated(kernel, monkeypatch):
    """Two calls, the second with changes -> what the JIT launched, and what was launched again past it."""
    again = []
    kernel.compiled = type("Compiled", (), {"__getitem__": lambda _, grid: lambda *launched: again.append(launched)})()
    monkeypatch.setattr(launch, "_ready", {})

    def run(changes, between=lambda: None):
        launch.run_stage(**INDEXED)
        between()
        launch.run_stage(**INDEXED | changes)
        return kernel.launches, again

    return run


def test_a_launch_is_repeated_with_the_new_operands(repeated, kernel):
    other = {"blocks": [torch.ones(2, 8, 16), torch.ones(2, 8, 16)], "weight": torch.ones(6, 32)}
    [(first, options)], [again] = repeated(other)
    assert [*map(id, (*again[0], again[1]))] == [*map(id, (*other["blocks"], other["weight"]))]
    assert again[6:8] == (None, None)  # K is not split
    assert again[8:] == (*first[8:], *(options[name] for name in kernel.arg_names[len(first) :]))


@pytest.mark.parametrize("what", OTHER)
def test_what_lies_otherwise_is_another_launch(what, repeated, monkeypatch):
    tf32 = functools.partial(monkeypatch.setattr, launch, "input_precision", lambda dtype: "tf32")
    launched, again = repeated(OTHER[what], tf32 if what == "precision" else lambda: None)
    assert (len(launched), again) == (2, [])
