"""Each file needs its own environment: `make test-kernels` and its like run it, any other run leaves it out."""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("STF_CLIENT_TESTS") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Of this process and those that it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
