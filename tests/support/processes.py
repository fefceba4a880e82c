"""Python in a process of its own, in the checkout, with the settings of this one out of the way."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, timeout: float = 120, **environment: str | None) -> subprocess.CompletedProcess:
    """Run python with the checkout importable; environment: variables to set, None to remove."""
    settings = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET",)}
    settings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in environment.items():
        if value is None:
            settings.pop(name, None)
        else:
            settings[name] = value
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=timeout
    )
