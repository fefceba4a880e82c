"""Run by `make test-browser`, which installs Chromium; any other run of pytest leaves this folder out."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from chromium import Chromium

collect_ignore_glob = [] if os.environ.get("STF_BROWSER_TESTS") == "1" else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # sample_results.py


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(names)} is on the PATH; `make test-browser` as root installs Chromium on Debian"
        )
    with Chromium(found, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium
