"""Result files: written whole or not at all, and refused when they are not what they claim to be.

A file is written beside its destination and renamed over it, so a reader never sees half of one. While a run is
under way its file says `"complete": false`; an interrupted run therefore leaves what it measured, marked as such.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .shape import Above, problem

SCHEMA = 1
_TIME = (float, None)  # None may stand where a stage does not exist in a mode
_TOTAL = (Above(0), None)  # ratios divide by it
_STAGES = ("vision_ms", "projector_ms", "insert_ms", "prefill_ms", "first_token_ms")
_FILE = {"device": str, "torch": str, "commit": str, "complete?": bool, "clock_mhz?": _TIME, "notes?": [str]}
_PLACE = {"batch": int, "text_tokens": int, "images?": int, "mode": str}
_PREFILL = {
    **_FILE, "dtype": str, "triton": (str, None), "transformers": str, "preset?": str, "speedup": {...: float},
    "refused": (str, None), "notes": [str], "clocks_mhz?": [_TIME], "savings_mean?": {...: str},
    "decode_tokens?": int, "ceilings?": {"flops": float, "bandwidth": float, "source": str}, "flags?": dict,
    "rows": [{
        **_PLACE, "model": str, "projector": str, "image_tokens": int, "savings?": [str], "failed": (str, None),
        **dict.fromkeys(("preprocess_ms", *_STAGES, "decode_ms_per_token", "projector_share"), _TIME),
        **dict.fromkeys(("spread_percent", "peak_mb", "kv_mb"), _TIME),
        "total_ms": _TOTAL, "floor_ratio": {...: _TIME}, "shares?": {...: _TIME}, "rounds?": int,
        "samples": {**{f"{stage}?": [_TIME] for stage in _STAGES}, "total_ms": [_TOTAL]},
        "wall_samples?": {name: [_TIME] for name in (*_STAGES, "total_ms")},
    }],
    "comparisons": [{
        **_PLACE, "row": str, "baseline_mode": str, "beyond_noise?": (bool, None),
        **dict.fromkeys(("ratio", "low", "high"), float),
    }],
    "targets?": [{"name": str, "value": float, "target": Above(0), "reached": bool, "why": (str, None)}],
    "checks": [{"name": str, "error": _TIME, "bound": float, "agrees": bool}],
}  # fmt: skip
_KERNELS = {
    **_FILE, "triton": (str, None), "clock_mhz": _TIME, "sizes?": str,
    "rows": [{
        "stage": str, "pass?": str, "batch": int, "dtype": str, "provider": str, "us": _TOTAL, "us_eager": _TOTAL,
        "floor_us": Above(0), "rel_error": _TIME, "failed?": (str, None), "samples?": [_TOTAL],
    }],
}  # fmt: skip
_TESTS = {**_FILE, "passed": int, "failed": int, "skipped": int, "failures?": [str]}
KINDS = {"prefill": _PREFILL, "kernels": _KERNELS, "tests": _TESTS}


class ResultError(ValueError):
    """A result file that cannot be used; the message names the file and the field."""


def write(path: Path, result: dict[str, Any]) -> None:
    """Atomically: a temporary file in the same folder, then a rename."""
    path = Path(path)
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
    path = Path(path)
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
