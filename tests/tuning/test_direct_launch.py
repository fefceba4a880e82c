"""If these fail, a launch reuses a kernel that was compiled for other arguments, or never reuses one."""

from types import SimpleNamespace

import pytest
import torch

from stf_kernels.ops import direct_launch, workspace
from stf_kernels.tuning import launches


class Kernel:
    """Stands in for a jitted kernel: counts compilations through the JIT and launches past it."""

    def __init__(self) -> None:
        names = ("x_ptr", "M", "N", "strides", "BLOCK")
        self.arg_names = list(names)
        self.params = [SimpleNamespace(do_not_specialize=name == "M") for name in names]
        self.bound, self.direct = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.bound.append((grid, arguments, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.direct.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setenv("STF_KERNELS_DIRECT_LAUNCH", "1")
    monkeypatch.setattr(direct_launch, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(direct_launch, "_compiled", {})
    return Kernel()


X = torch.zeros(64)


def launch(kernel, x=X, m=10, n=32, strides=(64,), block=16, **options) -> None:
    direct_launch.launch(kernel, (3,), (x, m, n, strides), {"BLOCK": block}, **{"num_warps": 4, **options})


def test_the_second_launch_goes_past_the_jit_with_every_argument_in_order(kernel):
    launch(kernel)
    launch(kernel, m=999)
    assert len(kernel.bound) == 1
    [(grid, arguments)] = kernel.direct
    assert grid == (3, 1, 1)
    assert arguments[0] is X
    assert arguments[1:] == (999, 32, (64,), 16)


@pytest.mark.parametrize(
    "change",
    [
        {"x": X.half()}, {"x": X[1:]}, {"n": 33}, {"strides": (65,)}, {"block": 32}, {"num_warps": 8}, {"m": 2**40},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_the_compiler_may_have_used_makes_another_kernel(kernel, change):
    launch(kernel)
    launch(kernel, **change)
    assert len(kernel.bound) == 2
    assert not kernel.direct


def test_a_descriptor_is_known_by_its_dtype_and_box(kernel):
    """Base, sizes and pitches are data; with offsets among them, every allocation would be another kernel."""

    def descriptor(base=X, box=(16, 16), size=64):
        return SimpleNamespace(base=base, block_shape=list(box), shape=[size, 64], strides=[64, 1])

    launch(kernel, x=descriptor())
    launch(kernel, x=descriptor(base=torch.zeros(32), size=32))
    assert (len(kernel.bound), len(kernel.direct)) == (1, 1)
    launch(kernel, x=descriptor(base=X.half()))
    launch(kernel, x=descriptor(box=(16, 32)))
    assert (len(kernel.bound), len(kernel.direct)) == (3, 1)


def test_it_is_not_the_default(kernel, monkeypatch):
    monkeypatch.delenv("STF_KERNELS_DIRECT_LAUNCH")
    monkeypatch.setattr(launches, "_faster", lambda index: frozenset())
    launch(kernel)
    launch(kernel)
    assert len(kernel.bound) == 2


def test_a_table_that_measured_it_makes_it_the_default_and_the_environment_has_the_last_word(kernel, monkeypatch):
    monkeypatch.delenv("STF_KERNELS_DIRECT_LAUNCH")
    monkeypatch.setattr(launches, "_faster", lambda index: frozenset(["direct"]))
    launch(kernel)
    launch(kernel)
    assert (len(kernel.bound), len(kernel.direct)) == (1, 1)
    monkeypatch.setenv("STF_KERNELS_DIRECT_LAUNCH", "0")
    launch(kernel)
    assert (len(kernel.bound), len(kernel.direct)) == (2, 1)


def test_counters_start_at_zero_and_belong_to_a_stream(monkeypatch):
    stream = SimpleNamespace(cuda_stream=1)
    real_zeros = torch.zeros
    monkeypatch.setattr(workspace, "_counters", {})
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: real_zeros(*shape, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    device = torch.device("cuda", 0)
    first = workspace.arrival_counters(8, device)
    assert not first.any()
    assert workspace.arrival_counters(8, device) is first
    stream.cuda_stream = 2
    assert workspace.arrival_counters(8, device) is not first
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = workspace.arrival_counters(8, device)
    assert captured is not first
    assert workspace.arrival_counters(8, device) is not captured, "a graph's counters are its own"
    with workspace.fresh_counters():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        compiled = workspace.arrival_counters(8, device)
    assert workspace.arrival_counters(8, device) is not compiled, "Inductor's memory pool keeps nothing of ours"


def test_a_compiled_program_gets_counters_of_its_own(monkeypatch):
    """Through the dispatcher, as from torch.compile; an eager call keeps them."""
    from stf_kernels import concat_linear
    from stf_kernels.ops import torch_path

    seen, run = [], torch_path.run_stage

    def spy(*arguments):
        seen.append(getattr(workspace._state, "fresh", False))
        return run(*arguments)

    monkeypatch.setattr(torch_path, "run_stage", spy)
    x, weight = torch.randn(1, 4, 8), torch.randn(5, 8)
    concat_linear([x], weight)
    torch.ops.stf_kernels.concat_linear([x], weight, None, None, 0, [])
    assert seen == [False, True]
