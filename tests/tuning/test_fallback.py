"""If this fails, a configuration that a GPU or its driver does not take ends a user's call and is not replaced."""

import warnings

import pytest
import torch

from stf_kernels import backend
from stf_kernels.ops import launch
from stf_kernels.ops.chain import run_stage
from stf_kernels.ops.forms import DescriptorRefused
from stf_kernels.ops.stage import Stage
from stf_kernels.tuning import lookup, smallest


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

    def launch_stage(blocks, weight, bias, stage, config, **_):
        configs.append(config)
        if config != smallest(2):
            raise refusal[0]
        return blocks[0], None

    monkeypatch.setattr(launch, "launch_stage", launch_stage)
    yield configs, refusal
    lookup._choose.cache_clear()


@pytest.mark.parametrize(
    ("error", "says"),
    [(out_of_resources(), "shared memory"), (DescriptorRefused("the driver refuses it"), "driver refuses")],
    ids=["resources", "descriptor"],
)
def test_it_falls_back_once_with_one_warning(launched, error, says):
    configs, refusal = launched
    refusal.append(error)
    x = torch.empty(1, 64, 128, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(256, 128, dtype=torch.bfloat16, device="meta")
    with pytest.warns(UserWarning, match=f"test-gpu.*{says}.*stf_kernels.tuning") as warned:
        run_stage([x], weight, None, Stage())
    assert len(warned) == 1
    assert configs[0] != smallest(2) == configs[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_stage([x], weight, None, Stage())
    assert configs[2:] == [smallest(2)], "the second call starts with what runs"


def test_another_error_is_the_users_to_see(launched):
    configs, refusal = launched
    refusal.append(RuntimeError("an illegal memory access was encountered"))
    x = torch.empty(1, 64, 128, dtype=torch.bfloat16, device="meta")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_stage([x], x[0], None, Stage())
    assert len(configs) == 1
