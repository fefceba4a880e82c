"""If this fails, use_backend picks another path than it says, or leaks out of its block or its thread; or the package
needs Triton, or imports what it should not, before it is asked for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.processes import python

import stf_kernels
from stf_kernels import backend
from stf_kernels.backend import current_backend

BLOCKS, WEIGHT = [torch.randn(1, 2, 4)] * 2, torch.randn(3, 8)


def call():
    return stf_kernels.concat_linear(BLOCKS, WEIGHT)


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 1, ["torch"]])
def test_an_unknown_name_is_refused_at_once(name):
    with pytest.raises(ValueError, match=r"backend.*auto.*triton.*torch") as error:
        stf_kernels.use_backend(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("module", [False, True])
def test_triton_on_cpu_tensors_names_the_remedy(module):
    projector = stf_kernels.CompactTokenProjector(2, 4, 5).requires_grad_(False)
    out, refusal = torch.zeros(4, 5), r"backend.*triton.*cpu.*TRITON_INTERPRET=1"
    with stf_kernels.use_backend("triton"), pytest.raises(ValueError, match=refusal):
        projector([torch.ones(1, 16, 4)] * 2, out=out, rows=torch.arange(4)) if module else call()
    assert not out.any()


def test_triton_refuses_float64_by_name():
    with stf_kernels.use_backend("triton"), pytest.raises(TypeError, match=r"dtype.*float16.*float64.*torch"):
        stf_kernels.concat_linear([b.double() for b in BLOCKS], WEIGHT.double())


@pytest.mark.parametrize(
    ("capability", "hip", "served"), [((7, 5), None, False), ((8, 0), None, True), ((), "6", True)]
)
def test_gpus_that_triton_serves(monkeypatch, capability, hip, served):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backend.triton_serves.__wrapped__(torch.device("cuda", 0)) is served
    assert not backend.triton_serves.__wrapped__(torch.device("cpu"))


def test_nesting_and_the_way_back():
    with stf_kernels.use_backend("torch"):
        with stf_kernels.use_backend("auto"):
            assert current_backend() == "auto"
        with pytest.raises(KeyError), stf_kernels.use_backend("triton"):
            raise KeyError
        assert current_backend() == "torch"
    decorated = stf_kernels.use_backend("torch")(current_backend)
    assert [current_backend(), decorated(), decorated(), current_backend()] == ["auto", "torch", "torch", "auto"]


def test_threads_do_not_see_each_other():
    with stf_kernels.use_backend("triton"), ThreadPoolExecutor(1) as other:
        assert other.submit(current_backend).result() == "auto"
        with stf_kernels.use_backend("torch"):
            assert other.submit(call).result().shape == (1, 2, 3)  # "triton" would raise here


@pytest.mark.parametrize("value", ["", "auto", "torch", "triton"])
def test_environment(value, monkeypatch):
    """As if the variable had been there before the first call."""
    monkeypatch.setattr(backend, "_default_backend", backend._default_backend.__wrapped__)
    monkeypatch.setenv("STF_KERNELS_BACKEND", value)
    assert current_backend() == (value or "auto")
    with stf_kernels.use_backend("torch"):
        assert current_backend() == "torch"  # the block wins
    monkeypatch.setenv("STF_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"STF_KERNELS_BACKEND.*auto.*triton.*torch.*'fast'"):
        call()


ALONE = """
import importlib.util, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers", "einops", "peft", "accelerate", "PIL"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else find(name, package)

import torch, stf_kernels
module = stf_kernels.CompactTokenProjector(2, 4, 5)
module([torch.zeros(1, 16, 4, requires_grad=True)] * 2).sum().backward()
try:
    with stf_kernels.use_backend("triton"):
        module([torch.zeros(1, 16, 4)] * 2)
except ValueError as error:
    print(error)
assert "triton" not in sys.modules and "reference" not in sys.modules and not torch.cuda.is_initialized()
"""


def test_without_triton_and_transformers():
    result = python("-c", ALONE)
    assert result.returncode == 0, result.stderr
    assert "triton is not installed; install it" in result.stdout
