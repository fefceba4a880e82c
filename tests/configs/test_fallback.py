"""If this fails, a configuration that a GPU or its driver does not take ends a user's call and is not replaced.

A pretended GPU: the kernels only note their configuration, or refuse it. tests/launch has Triton's own launcher do it.
"""

import warnings

import pytest
import torch
from triton.runtime.errors import OutOfResources

from stf_kernels import configs
from stf_kernels.configs import GemmConfig, default_config, tables
from stf_kernels.ops import launch, tma, weight_grad
from stf_kernels.ops.segments import Stage

X = torch.zeros(1, 64, 128, dtype=torch.bfloat16)
WEIGHT = torch.zeros(256, 128, dtype=torch.bfloat16)
CHOSEN = default_config("sm_90", 2, 64, 256, 128)
TMA = GemmConfig(128, 256, 64, 8, 8, 4, form="tma")


@pytest.fixture
def gpu(pretend, monkeypatch):
    """ran, refused: what ran, and the error of each configuration that does not."""
    pretend("sm_90")
    ran, refused = [], {}

    class Kernel:
        arg_names = ()

        def __init__(self, config):
            self.config = config

        def __getitem__(self, grid):
            return self.launch

        def launch(self, **options):
            if self.config in refused:
                raise refused[self.config]
            ran.append(self.config)

    for form in launch.ARGUMENTS:
        monkeypatch.setitem(launch.ARGUMENTS, form, lambda config, *_: (Kernel(config), (1, 1, 1), (), (), {}))
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda device, gemm, **o: choose(torch.device("cuda", 0), gemm, **o))
    monkeypatch.setattr(launch, "_warned", set())
    return ran, refused


def test_it_falls_back_once_with_one_warning(gpu):
    ran, refused = gpu
    refused[CHOSEN] = OutOfResources(300_000, 232_448, "shared memory")
    with pytest.warns(UserWarning, match=r"test-gpu.*shared memory.*Plain torch serves") as warned:
        launch.run_stage([X], WEIGHT, None, Stage())
    assert len(warned) == 1
    refused[CHOSEN] = AssertionError("the second call starts with what runs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.run_stage([X], WEIGHT, None, Stage())
    assert not ran
    refused[CHOSEN] = OutOfResources(400_000, 232_448, "shared memory")
    with pytest.raises(OutOfResources, match="400000"):  # who forces a kernel hears why it does not run
        launch.run_stage([X], WEIGHT, None, Stage(), forced=True)


def test_a_weight_gradient_falls_back_to_the_library(gpu, monkeypatch):
    tried = []

    def launch_wgrad(g, blocks, stage, config):
        tried.append(config)
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(weight_grad, "launch_wgrad", launch_wgrad)
    g = torch.empty(2 * 64, 256, dtype=torch.bfloat16, device="meta")
    cropped = torch.empty(2, 65, 128, dtype=torch.bfloat16, device="meta")[:, 1:]
    with pytest.warns(UserWarning, match="shared memory.*Plain torch serves"):
        dw = weight_grad.first_weight_grad(g, [cropped], (256, 128), Stage(), "triton")
    assert dw.shape == (256, 128)
    weight_grad.first_weight_grad(g, [cropped], (256, 128), Stage(), "triton")
    assert len(tried) == 1, "the second call starts with what runs"


def test_another_error_is_the_users_to_see(gpu):
    ran, refused = gpu
    refused[CHOSEN] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch.run_stage([X], WEIGHT, None, Stage())
    assert ran == []


def test_a_refused_descriptor_costs_its_own_call_alone(gpu, monkeypatch):
    """It is the operands that the driver refuses: plain torch serves, or the pointer kernel; nothing is banned."""
    ran, refused = gpu
    refused[TMA] = RuntimeError("Failed to create tensor map descriptor: invalid argument")
    monkeypatch.setattr(configs, "choose", lambda *_, **__: (TMA, True))
    with pytest.warns(UserWarning, match=r"driver refuses.*tensor map.*plain torch serves"):
        launch.run_stage([X], WEIGHT, None, Stage())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for forced in (False, True):
            launch.run_stage([X], WEIGHT, None, Stage(), forced=forced)
    assert ran == [TMA.portable()]
    assert not tables.cache_of("test-gpu", "sm_90").failed


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), OutOfResources),
        (RuntimeError("Failed to create tensor map descriptor: invalid argument"), tma.Refused),
    ],
)
def test_who_names_a_configuration_gets_no_other(gpu, error, seen):
    ran, refused = gpu
    refused[TMA] = error
    with pytest.raises(seen):
        launch.run_stage([X], WEIGHT, None, Stage(), TMA)
    assert ran == []
