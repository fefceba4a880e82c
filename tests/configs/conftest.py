"""A GPU that is not there: what the choice of a configuration asks of one."""

import pytest
import torch

from stf_kernels.configs import selection, tables


@pytest.fixture
def pretend(monkeypatch):
    """pretend(arch): every GPU is a "test-gpu" of that architecture, of which nothing is known yet."""

    def forget() -> None:
        for cached in (tables.table_of, selection._choose, selection._default):
            cached.cache_clear()

    def pretend(arch: str = "sm_90") -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(selection, "device_identity", lambda index: ("test-gpu", arch))
        monkeypatch.setattr(selection, "multiprocessors", lambda index: 132)
        monkeypatch.setattr(selection, "_rejected", set())

    yield pretend
    forget()
