"""Nothing is downloaded. Each file needs an environment of its own, which `make test-kernels` and its like make."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # tiny_llava.py


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """In this process and those that it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def folder(tmp_path):
    from support.clients import make_folder  # each client has another part of what this imports

    return make_folder(tmp_path / "llava-stf")
