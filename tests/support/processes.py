"""Python in a process of its own, in the checkout, with the settings of this one out of the way."""

import os
import subprocess
import sys
from pathlib import Path

from bench.command import patient

ROOT = Path(__file__).resolve().parents[2]


def clean_environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with the checkout importable and no backend chosen; changes: None removes."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in changes.items():
        settings.pop(name, None)
        if value is not None:
            settings[name] = value
    return settings


def python(*arguments: str, timeout: float = 300, **environment: str | None) -> subprocess.CompletedProcess:
    """Run python in the checkout; timeout: on an idle machine; environment: variables to set, None to remove."""
    options = {"cwd": ROOT, "env": clean_environment(**environment), "timeout": patient(timeout)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
