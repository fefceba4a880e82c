"""Where a measurement was taken: device, versions, commit, clocks. A row without these does not exist."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """STF_COMMIT where there is no .git; else the checkout's commit, with "+dirty" when tracked files differ."""
    if given := os.environ.get("STF_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The GPU's own name, or the CPU's with its number of threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"


def folder_name(device: str) -> str:
    """A device's folder of results, named as its tuning table is: "NVIDIA H200" -> "nvidia-h200"."""
    from stf_kernels.tuning.lookup import device_slug

    return device_slug(device_name(device))


def clock_mhz() -> float | None:
    """The SM clock of GPU 0 right now, or None where it cannot be asked (no NVIDIA tool, no GPU)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        return float(done.stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def describe(device: str) -> dict[str, Any]:
    """The part of every result file that says where it came from."""
    return {
        "device": device_name(device),
        "torch": version("torch"),
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": commit(),
        "clock_mhz": clock_mhz() if device.startswith("cuda") else None,
    }


def results_folder(device: str) -> Path:
    """Where a run's files go unless it is told: inside the ignored `.work/`, so that no run dirties the checkout."""
    return ROOT / ".work" / "results" / folder_name(device)
