"""GPUs that are not there. pretend: what the choice of a configuration asks of one; gpu: one that computes on the CPU,
right or as planted, and whose clock says what was planted."""

from collections import Counter

import pytest
import torch

from stf_kernels import configs
from stf_kernels.configs import selection, tables
from stf_kernels.ops import first_use, launch, torch_path

CUDA = torch.device("cuda", 0)
SLOW = 90.0  # of a kernel whose time is not planted; plain torch takes 50


@pytest.fixture
def pretend(monkeypatch):
    """pretend(arch): every GPU is a "test-gpu" of that architecture, of which nothing is known yet."""

    def forget() -> None:
        for cached in (tables.table_of, tables.cache_of, selection._model):
            cached.cache_clear()

    def pretend(arch: str = "sm_90") -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(selection, "device_identity", lambda index: ("test-gpu", arch))
        monkeypatch.setattr(selection, "multiprocessors", lambda index: 132)
        for name, nothing in (("_attempts", Counter()), ("_said", set())):
            monkeypatch.setattr(selection, name, nothing)
        monkeypatch.setattr(launch, "_ready", {})
        monkeypatch.setattr(launch, "_chosen", {})
        # These tests ask which kernel serves; test_fallback.py has where plain torch does.
        monkeypatch.setattr(selection, "copy_cycles", lambda *_: float("inf"))

    yield pretend
    forget()


class Gpu:
    """planted: what a configuration does instead of computing; us: its time. ran: all that was launched in trials.
    compiled: what a launch gives back, as Triton's."""

    compiled = None

    def __init__(self):
        self.planted, self.us, self.ran, self.launched, self.alive, self.selections = {}, {None: 50.0}, [], [], True, 0

    def arguments(self, config, tensors, stage):
        room = torch.zeros(4) if config.split_k > 1 else None
        return Kernel(self, config, tensors, stage, room), (1, 1, 1), (room, None), (), {}

    def medians(self, calls, device, most):
        self.selections += 1
        for call in calls:
            call()
        return [self.us.get(call.args[1], SLOW) for call in calls]

    def synchronize(self, device=None):
        if not self.alive:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Kernel:
    arg_names = ()

    def __init__(self, gpu, config, tensors, stage, room=None):
        self.gpu, self.config, self.tensors, self.stage, self.room = gpu, config, tensors, stage, room

    def warmup(self, *_, grid, **__):
        if self.gpu.planted.get(self.config) == "does not compile":
            raise RuntimeError("PassManager::run failed\nand more")

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *_, **__):
        blocks, weight, bias, y, pre, rows = self.tensors
        planted = self.gpu.planted.get(self.config)
        if isinstance(planted, BaseException):
            raise planted
        self.gpu.ran.append((self.config, y.isnan().all().item() and (self.room is None or self.room.isnan().all())))
        if planted == "dies":
            self.gpu.alive = False
        found, found_pre = torch_path.run_stage(blocks, weight, bias, self.stage, pre is not None)
        if rows is None:
            y.copy_(found)
        else:
            y[rows] = found.flatten(0, 1).to(y.dtype)
        if pre is not None:
            pre.copy_(found_pre)
        if planted == "does not read x":
            y.copy_(torch_path.run_stage([torch.zeros_like(blocks[0])], weight, bias, self.stage)[0])
        if planted == "half of K":
            half = torch.arange(weight.shape[1]) < weight.shape[1] // 2
            y.copy_(torch_path.run_stage(blocks, weight * half, bias, self.stage)[0])
        if planted == "wrong":
            y.view(-1, y.shape[-1])[-1] += 0.5
        if planted == "a row not written":
            y.view(-1, y.shape[-1])[1] = float("nan")
        if planted == "dies":
            self.gpu.synchronize()
        return self.gpu.compiled


@pytest.fixture
def gpu(pretend, monkeypatch, tmp_path):
    pretend("sm_90")
    gpu = Gpu()
    for form in launch.ARGUMENTS:
        monkeypatch.setitem(launch.ARGUMENTS, form, gpu.arguments)
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda device, gemm, **options: choose(CUDA, gemm, **options))
    monkeypatch.setattr(selection, "selects", lambda: True)
    monkeypatch.setattr(first_use, "medians", gpu.medians)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("STF_KERNELS_CACHE", str(tmp_path))
    return gpu
