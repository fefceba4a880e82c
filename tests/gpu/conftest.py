"""Tests of the compiled kernels. pytest, torch, triton and einops are all they need."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch):
    """fp32 products in fp32, for torch and for the kernels alike."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty holds NaN. The deterministic mode that does it elsewhere would change what cuBLAS runs."""

    def poison(original):
        def made(*args, **kwargs):
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    assert bool(torch.empty(2, device="cuda").isnan().all())
