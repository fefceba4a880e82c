"""Run by `make test-browser`, which installs Chromium; any other run of pytest leaves this folder out."""

import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("STF_BROWSER_TESTS") == "1" else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # sample_results.py
