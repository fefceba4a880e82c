"""If this fails, a call on a GPU selects what is wrong, or a first use costs more than it says."""

import json

import pytest
import torch
from support.compare import compare_modules, twins

import stf_kernels
from stf_kernels.configs import selection, tables
from stf_kernels.ops import launch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [False, True])
def test_a_projector_is_selected_and_right(dtype, training, monkeypatch, tmp_path):
    """Every product has an entry with the time of plain torch and of others, and no candidate was wrong."""
    monkeypatch.setenv("STF_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(selection, "selects", lambda: True)
    tables.cache_of.cache_clear()
    launch.forget()
    try:
        modules = twins("CompactTokenProjector", 4, 128, 256, skip_tokens=1, dtype=dtype, device="cuda")
        report = stf_kernels.prepare(modules[0], batch_sizes=(2,), training=training, grid=(12, 12))
        assert {entry["by"] for entry in report.entries} <= {"selected", "table"}, str(report)
        blocks = [torch.randn(2, 145, 128, device="cuda") for _ in range(4)]
        compare_modules(modules, blocks, dtype, gradients=training)
        [path] = tmp_path.glob("*.json")
        kept = json.loads(path.read_text())
        assert not kept["failed"]
        assert all(len(entry["candidates"]) > 1 for entry in kept["entries"])
    finally:
        tables.cache_of.cache_clear()
        launch.forget()
