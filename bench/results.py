"""Result files: where they were measured, written whole or not at all, refused when they are not what they say.

A file is written beside its destination and renamed over it, so a reader never sees half of one. While a run is under
way its file says `"complete": false`; an interrupted run therefore leaves what it measured, marked as such.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
HUGE = 1e300  # JSON has integers that no float holds


class Above(float):
    """In a shape: a finite number above this one."""


_TIME = (float, None)  # None may stand where a stage does not exist in a mode
_TOTAL = (Above(0), None)  # ratios divide by it
_FILE = {"device": str, "torch": str, "commit": str, "complete": bool, "notes": [str]}
_PLACE = {"batch": int, "text_tokens": int, "images": int, "mode": str}
_STAGES = ("vision_ms", "projector_ms", "insert_ms", "prefill_ms", "first_token_ms")
_PREFILL_ROW = {
    **_PLACE,
    **{"model": str, "projector": str, "image_tokens": int, "savings": [str], "failed": (str, None), "rounds": int},
    **dict.fromkeys((*_STAGES, "preprocess_ms", "decode_ms_per_token", "projector_share"), _TIME),
    **dict.fromkeys(("spread_percent", "peak_mb", "kv_mb", "warm_up_s"), _TIME),
    **{"total_ms": _TOTAL, "floor_ratio": {...: _TIME}, "samples": {"total_ms": [_TOTAL]}},
}
_COMPARISON = {
    **_PLACE,
    **{"row": str, "baseline": str, "baseline_mode": str, "beyond_noise": (bool, None)},
    **dict.fromkeys(("ratio", "low", "high"), float),
}
_PREFILL = {
    **_FILE,
    **dict.fromkeys(("dtype", "transformers", "preset", "attention", "weights"), str),
    **{"triton": (str, None), "refused": (str, None), "savings_mean": {...: str}, "speedup": {...: float}},
    **{"flags": dict, "ceilings": {"flops": Above(0), "bandwidth": Above(0), "source": str}, "clocks_mhz": [_TIME]},
    **{"rows": [_PREFILL_ROW], "comparisons": [_COMPARISON]},
    "checks": [{"name": str, "error": _TIME, "bound": float, "agrees": bool}],
}
_KERNEL_ROW = {
    **{"stage": str, "pass": str, "batch": int, "dtype": str, "provider": str, "floor_us": Above(0)},
    **dict.fromkeys(("us", "us_eager"), _TOTAL),
    **{"rel_error": _TIME, "us_host": _TIME, "peak_mb": _TIME, "failed": (str, None), "samples": [_TOTAL]},
}
_KERNELS = {**_FILE, "triton": (str, None), "clock_mhz": _TIME, "sizes": str, "rows": [_KERNEL_ROW]}
_TESTS = {**_FILE, "passed": int, "failed": int, "skipped": int, "failures": [str]}
KINDS = {"prefill": _PREFILL, "kernels": _KERNELS, "tests": _TESTS}


class ResultError(ValueError):
    """A result file that cannot be used; the message names the file and the field."""


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            # allow_nan=False: NaN is not JSON, and a NaN that reaches a table is a bug here, not in the reader.
            json.dump(result, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from the other users of a machine
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read(path: Path) -> dict[str, Any]:
    """The checked content of a result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also of integers with thousands of digits
        raise ResultError(f"{path}: not JSON, perhaps cut short ({error}); measure again") from None
    check(result, str(path))
    return result


def check(result: Any, name: str) -> None:
    """Raise ResultError unless `result` has the fields and types of its kind."""
    if not isinstance(result, dict):
        raise ResultError(f"{name}: expected an object, got {type(result).__name__}")
    kind = result.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ResultError(f"{name}: kind: expected one of {sorted(KINDS)}, got {kind!r}")
    if result.get("schema") != SCHEMA:
        raise ResultError(f"{name}: schema: expected {SCHEMA}, got {result.get('schema')!r}; measure again")
    if found := problem(result, KINDS[kind], name):
        raise ResultError(found)


def problem(value: Any, shape: Any, name: str) -> str | None:
    """The first place where `value` has another shape, in words.

    A shape is a type, Above(0), None, (either, or), [of each], {"field": shape} with others beside, {...: of each}.
    """
    inside = []
    if isinstance(shape, tuple):
        fits = any(problem(value, each, name) is None for each in shape)
    elif isinstance(shape, list):
        if fits := isinstance(value, list):
            inside = [(f"{name}[{i}]", each, shape[0]) for i, each in enumerate(value)]
    elif isinstance(shape, dict):
        if fits := isinstance(value, dict):
            fields = dict.fromkeys(value, shape[...]) if ... in shape else shape
            if missing := next((field for field in fields if field not in value), None):
                return f"{name}: {missing}: missing"
            inside = [(f"{name}: {field}", value[field], expected) for field, expected in fields.items()]
    elif shape is float or isinstance(shape, Above):
        least = shape if isinstance(shape, Above) else -HUGE
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and least < value < HUGE
    else:
        fits = (
            value is None if shape is None else isinstance(value, shape) and (shape is bool) == isinstance(value, bool)
        )
    if not fits:
        text = repr(value)
        return f"{name}: expected {_said(shape)}, got {text if len(text) <= 60 else f'{text[:57]}...'}"
    return next(filter(None, (problem(each, expected, place) for place, each, expected in inside)), None)


def _said(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_said, shape))
    if isinstance(shape, Above):
        return f"a number above {shape:g}"
    if isinstance(shape, (list, dict)):
        return "list" if isinstance(shape, list) else "an object"
    return "null" if shape is None else shape.__name__


def commit() -> str:
    """STF_COMMIT where there is no .git; else the checkout's commit, with "+dirty" when tracked files differ."""
    if given := os.environ.get("STF_COMMIT"):
        return given
    try:
        return _said_by("git", "rev-parse", "HEAD") + "+dirty" * bool(_said_by("git", "status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _said_by(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def device_name(device: str) -> str:
    """The GPU's own name, or the CPU's with its number of threads."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def folder_name(device: str) -> str:
    """A device's folder of results, named as its tuning table is: "NVIDIA H200" -> "nvidia-h200"."""
    from stf_kernels.configs import device_slug

    return device_slug(device_name(device))


def results_folder(device: str) -> Path:
    """Where a run's files go unless it is told: inside the ignored `.work/`, so that no run dirties the checkout."""
    return ROOT / ".work" / "results" / folder_name(device)


def clock_mhz() -> float | None:
    """The SM clock of GPU 0 right now, or None where it cannot be asked (no NVIDIA tool, no GPU)."""
    try:
        return float(_said_by("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def describe(kind: str, device: str) -> dict[str, Any]:
    """How every result file begins: what it is, and where it came from."""
    return {
        **{"schema": SCHEMA, "kind": kind, "complete": False, "device": device_name(device)},
        **{package: version(package) for package in ("torch", "triton", "transformers")},
        **{"python": platform.python_version(), "commit": commit()},
        "clock_mhz": clock_mhz() if device.startswith("cuda") else None,
        "notes": [],
    }
