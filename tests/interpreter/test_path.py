"""If this fails, the way from a call to its kernel has grown longer, reads the environment, makes a copy or is another
backend's, or a launch is repeated with operands that lie otherwise."""

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
from stf_kernels.kernels import segmented_linear
from stf_kernels.ops import autograd, launch

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


class Compiled:
    """What a launch on a GPU returns: the kernel, to be launched again without the JIT."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append(arguments)


def operands():
    """blocks, weight, bias, out, rows: an indexed stage of two blocks."""
    return [zeros(2, 8, 16), zeros(2, 8, 16)], zeros(6, 32), zeros(6), zeros(20, 6), torch.arange(16)


def spread(x):
    """The same shape with twice the stride between rows."""
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def shifted(x):
    """The same shape and strides at an address that is no multiple of 16."""
    return torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape)


SAME = {
    "nothing": lambda blocks, w, b, out, rows: (blocks, w, b, out, rows),
    "other-values": lambda blocks, w, b, out, rows: ([x + 1 for x in blocks], w + 1, b + 1, out + 1, rows.flip(0)),
}
OTHER = {
    "tokens": lambda blocks, w, b, out, rows: ([x[:, :4].contiguous() for x in blocks], w, b, out, rows[:8].clone()),
    "batch": lambda blocks, w, b, out, rows: ([x[:1].clone() for x in blocks], w, b, out, rows[:8].clone()),
    "columns": lambda blocks, w, b, out, rows: (blocks, zeros(5, 32), zeros(5), zeros(20, 5), rows),
    "block-strides": lambda blocks, w, b, out, rows: ([blocks[0], spread(blocks[1])], w, b, out, rows),
    "block-address": lambda blocks, w, b, out, rows: ([blocks[0], shifted(blocks[1])], w, b, out, rows),
    "dtype": lambda blocks, w, b, out, rows: ([x.half() for x in blocks], w.half(), b.half(), out.half(), rows),
    "weight-stride": lambda blocks, w, b, out, rows: (blocks, spread(w), b, out, rows),
    "no-bias": lambda blocks, w, b, out, rows: (blocks, w, None, out, rows),
    "no-out": lambda blocks, w, b, out, rows: (blocks, w, b, None, None),
    "out-rows": lambda blocks, w, b, out, rows: (blocks, w, b, out[:17], rows),
    "out-stride": lambda blocks, w, b, out, rows: (blocks, w, b, spread(out), rows),
    "out-dtype": lambda blocks, w, b, out, rows: (blocks, w, b, out.half(), rows),
}


@pytest.mark.parametrize("what", [*SAME, *OTHER])
def test_a_launch_that_is_repeated(what, kernel, monkeypatch):
    """With the new operands and the old sizes and constants; whatever those depend on is another launch."""
    kernel.compiled = compiled = Compiled()
    monkeypatch.setattr(launch, "_ready", {})
    stage = stf_kernels.ops.segments.Stage("gelu")

    def run(blocks, weight, bias, out, rows):
        launch.run_stage(blocks, weight, bias, stage, out=out, rows=rows)

    run(*operands())
    blocks, weight, bias, out, rows = (SAME | OTHER)[what](*operands())
    run(blocks, weight, bias, out, rows)
    if what in OTHER:
        assert (len(kernel.launches), len(compiled.launches)) == (2, 0)
        return
    assert (len(kernel.launches), len(compiled.launches)) == (1, 1)
    first, options = kernel.launches[0]
    [again] = compiled.launches
    assert all(mine is theirs for mine, theirs in zip(again[0], blocks, strict=True))
    assert again[1] is weight
    assert again[6:8] == (None, None)  # K is not split
    constants = [options[name] for name in kernel.arg_names[len(first) :]]
    assert again[8:] == (*first[8:], *constants)


@pytest.mark.parametrize("what", ["stage", "configuration", "save_pre", "forced", "precision"])
def test_options_of_a_launch_that_is_repeated(what, kernel, monkeypatch):
    kernel.compiled = compiled = Compiled()
    monkeypatch.setattr(launch, "_ready", {})
    blocks, weight, bias, *_ = operands()
    stages = [stf_kernels.ops.segments.Stage(activation) for activation in ("gelu", "silu")]
    launch.run_stage(blocks, weight, bias, stages[0])
    options = {
        "configuration": {"config": stf_kernels.configs.GemmConfig(16, 16, 16)},
        "save_pre": {"save_pre": True},
        "forced": {"forced": True},
    }.get(what, {})
    if what == "precision":
        monkeypatch.setattr(launch, "input_precision", lambda dtype: "tf32")
    launch.run_stage(blocks, weight, bias, stages[what == "stage"], **options)
    assert (len(kernel.launches), len(compiled.launches)) == (2, 0)
