"""If this fails, a configuration that a GPU or its driver does not take ends a user's call and is not replaced."""

import warnings

import pytest
import torch

from stf_kernels import backend
from stf_kernels.ops import forms, launch, weight_grad
from stf_kernels.ops.chain import run_stage
from stf_kernels.ops.forms import Call, DescriptorRefused
from stf_kernels.ops.segments import Stage
from stf_kernels.configs import GemmConfig, lookup, smallest


def out_of_resources():
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def launched(monkeypatch):
    """A pretended GPU: what would be launched, and the error with which the first configuration is refused."""
    monkeypatch.setattr(backend, "use_triton", lambda device, dtype: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(lookup, "device_identity", lambda index: ("test-gpu", "sm_90"))
    monkeypatch.setattr(lookup, "_too_large", set())
    lookup._choose.cache_clear()
    configs, refusal = [], []

    def run_stage(blocks, weight, bias, stage, config, **_):
        configs.append(config)
        if config != smallest(2):
            raise refusal[0]
        return blocks[0], None

    monkeypatch.setattr(launch, "run_stage", run_stage)
    yield configs, refusal
    lookup._choose.cache_clear()


def test_it_falls_back_once_with_one_warning(launched):
    configs, refusal = launched
    refusal.append(out_of_resources())
    x = torch.empty(1, 64, 128, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256, 128, dtype=torch.bfloat16, device="meta")
    with pytest.warns(UserWarning, match="test-gpu.*shared memory.*stf_kernels.tuning") as warned:
        run_stage([x], weight, None, Stage())
    assert len(warned) == 1
    assert configs[0] != smallest(2) == configs[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_stage([x], weight, None, Stage())
    assert configs[2:] == [smallest(2)], "the second call starts with what runs"


def test_a_weight_gradient_falls_back_to_the_library(launched, monkeypatch):
    tried = []

    def launch_wgrad(g, blocks, stage, config):
        tried.append(config)
        raise out_of_resources()

    monkeypatch.setattr(weight_grad, "launch_wgrad", launch_wgrad)
    g = torch.empty(2 * 64, 256, dtype=torch.bfloat16, device="meta")
    cropped = torch.empty(2, 65, 128, dtype=torch.bfloat16, device="meta")[:, 1:]
    with backend.use_backend("triton"):
        with pytest.warns(UserWarning, match="shared memory.*the library GEMM serves instead"):
            dw = weight_grad.first_weight_grad(g, [cropped], (256, 128), Stage())
        assert dw.shape == (256, 128)
        weight_grad.first_weight_grad(g, [cropped], (256, 128), Stage())
    assert len(tried) == 1, "the second call starts with what runs"


def test_another_error_is_the_users_to_see(launched):
    configs, refusal = launched
    refusal.append(RuntimeError("an illegal memory access was encountered"))
    x = torch.empty(1, 64, 128, dtype=torch.bfloat16, device="meta")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_stage([x], x[0], None, Stage())
    assert len(configs) == 1


@pytest.fixture
def refused(monkeypatch):
    """A driver that takes no tensor descriptor, and the configurations that run by pointers instead."""
    ran = []

    def refuse(self, config, layout):
        raise RuntimeError("Failed to create tensor map descriptor: invalid argument")

    monkeypatch.setattr(Call, "_by_descriptors", refuse)
    monkeypatch.setattr(Call, "_by_pointers", lambda self, config: ran.append(config))
    monkeypatch.setattr("stf_kernels.ops.descriptors.is_hopper_or_later", lambda device: True)
    monkeypatch.setattr(forms, "_warned", set())
    return ran


TMA = GemmConfig(128, 256, 64, 8, 8, 4, form="tma")


def test_a_refused_descriptor_costs_its_own_call_alone(refused):
    """It is the operands that the driver refuses: the portable kernel of the same tile serves, nothing is banned."""
    x, weight = torch.zeros(1, 64, 128, dtype=torch.bfloat16), torch.zeros(256, 128, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="driver refuses.*tensor map.*portable"):
        launch.run_stage([x], weight, None, Stage(), TMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch.run_stage([x], weight, None, Stage(), TMA)
    assert refused == [TMA.portable()] * 2
    assert not lookup._too_large


def test_who_measures_a_kernel_gets_no_other(refused):
    x, weight = torch.zeros(1, 64, 128, dtype=torch.bfloat16), torch.zeros(256, 128, dtype=torch.bfloat16)
    cropped = torch.zeros(2, 61, 128, dtype=torch.bfloat16)[:, 1:]
    for operand, why in ((cropped, "no descriptor"), (x, "driver refuses")):
        with pytest.raises(DescriptorRefused, match=why):
            launch.run_stage([operand], weight, None, Stage(), TMA, strict=True)
    assert not refused
