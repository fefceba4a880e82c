"""If this fails, a configuration that a GPU or its driver does not take ends a user's call and is not replaced.

On a pretended GPU (conftest.py); tests/launch has Triton's own launcher do it.
"""

import warnings
import weakref

import pytest
import torch
from triton.runtime.errors import OutOfResources

from stf_kernels import configs
from stf_kernels.configs import GemmConfig, default_config, selection, tables
from stf_kernels.ops import launch, torch_path
from stf_kernels.ops.segments import Stage

X = torch.zeros(1, 64, 128, dtype=torch.bfloat16)
WEIGHT = torch.zeros(256, 128, dtype=torch.bfloat16)
CHOSEN = default_config("sm_90", 2, 64, 256, 128)
TMA = GemmConfig(128, 256, 64, 8, 8, 4, form="tma")


@pytest.fixture
def gpu(gpu, monkeypatch):
    """The one of conftest.py, on which nothing is selected: what the model says is what is launched."""
    monkeypatch.setattr(selection, "selects", lambda: False)
    monkeypatch.setattr(launch, "_warned", set())
    return gpu


def test_it_falls_back_once_with_one_warning(gpu):
    gpu.planted[CHOSEN] = OutOfResources(300_000, 232_448, "shared memory")
    with pytest.warns(UserWarning, match=r"test-gpu.*shared memory.*Plain torch serves") as warned:
        launch.run_stage([X], WEIGHT, None, Stage())
    assert len(warned) == 1
    gpu.planted[CHOSEN] = AssertionError("the second call starts with what runs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.run_stage([X], WEIGHT, None, Stage())
    assert not gpu.ran
    gpu.planted[CHOSEN] = OutOfResources(400_000, 232_448, "shared memory")
    with pytest.raises(OutOfResources, match="400000"):  # who forces a kernel hears why it does not run
        launch.run_stage([X], WEIGHT, None, Stage(), forced=True)


@pytest.mark.parametrize(("hip", "kept"), [(None, 1), ("7", 0)])
def test_a_launch_is_repeated_on_nvidia_alone(gpu, monkeypatch, hip, kept):
    """Of a compiled kernel that takes its arguments as NVIDIA's do; interpreted, there is none."""
    monkeypatch.setattr(torch.version, "hip", hip)
    launch.run_stage([X], WEIGHT, None, Stage())
    assert not launch._ready
    monkeypatch.setattr(type(gpu), "compiled", object())
    launch.run_stage([X], WEIGHT, None, Stage())
    assert len(launch._ready) == kept


def test_another_error_is_the_users_to_see(gpu):
    gpu.planted[CHOSEN] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch.run_stage([X], WEIGHT, None, Stage())
    assert not gpu.ran


def test_a_refused_descriptor_costs_its_own_call_alone(gpu, monkeypatch):
    """It is the operands that the driver refuses: plain torch serves, or the pointer kernel; nothing is banned."""
    gpu.planted[TMA] = RuntimeError("Failed to create tensor map descriptor: invalid argument")
    monkeypatch.setattr(configs, "choose", lambda *_, **__: (TMA, True))
    with pytest.warns(UserWarning, match=r"driver refuses.*tensor map.*plain torch serves"):
        launch.run_stage([X], WEIGHT, None, Stage())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forced in (False, True):
            launch.run_stage([X], WEIGHT, None, Stage(), forced=forced)
    assert [config for config, _ in gpu.ran] == [TMA.portable()]
    assert not tables.cache_of("test-gpu", "sm_90").failed


def test_what_a_refused_kernel_was_to_write_is_let_go(gpu, monkeypatch):
    """Plain torch's own operands may be twice as large; at 16 images 72 MB lay beside them."""
    monkeypatch.setattr(configs, "choose", lambda *_, **__: (TMA, True))
    plain, written = torch_path.run_stage, []

    def noted(config, tensors, stage):
        written.append(weakref.ref(tensors[3]))
        raise RuntimeError("Failed to create tensor map descriptor: invalid argument")

    def run_stage(*operands, **options):
        assert [y() for y in written] == [None]
        return plain(*operands, **options)

    monkeypatch.setitem(launch.ARGUMENTS, "tma", noted)
    monkeypatch.setattr(torch_path, "run_stage", run_stage)
    with pytest.warns(UserWarning, match="plain torch serves"):
        launch.run_stage([X], WEIGHT, None, Stage())
    assert written
