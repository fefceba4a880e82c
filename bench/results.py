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

SCHEMA = 1
COMMON = {"device": str, "torch": str, "commit": str, "rows": list}
_MEASURED = (float, None)
# kind -> (fields of the file, fields of each row); None may stand where a stage does not exist in a mode.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prefill": (
        {
            **COMMON, "dtype": str, "triton": (str, None), "transformers": str, "speedup": dict, "checks": list,
            "comparisons": list, "notes": list, "refused": (str, None),
        },
        {
            "model": str, "projector": str, "batch": int, "image_tokens": int, "text_tokens": int, "mode": str,
            **dict.fromkeys(("preprocess_ms", "vision_ms", "projector_ms", "insert_ms", "prefill_ms"), _MEASURED),
            **dict.fromkeys(("first_token_ms", "total_ms", "decode_ms_per_token", "projector_share"), _MEASURED),
            **dict.fromkeys(("spread_percent", "peak_mb", "kv_mb"), _MEASURED),
            "floor_ratio": dict, "samples": dict, "failed": (str, None),
        },
    ),
    "kernels": (
        {**COMMON, "triton": (str, None), "clock_mhz": (float, None)},
        {
            "stage": str, "batch": int, "dtype": str, "provider": str, "us": (float, None), "us_eager": (float, None),
            "floor_us": float, "rel_error": (float, None),
        },
    ),
    "tests": ({"device": str, "torch": str, "commit": str, "passed": int, "failed": int, "skipped": int}, {}),
}  # fmt: skip
# What older files lack, and what they must be where they are.
OPTIONAL = {"images": int, "savings": list, "shares": dict, "wall_samples": dict}
LISTED = {
    "comparisons": {
        "row": str, "batch": int, "text_tokens": int, "mode": str, "baseline_mode": str, "ratio": float, "low": float,
        "high": float,
    },
    "targets": {"name": str, "value": float, "target": float, "reached": bool, "why": (str, None)},
    "checks": {"name": str, "error": (float, None), "bound": float, "agrees": bool},
}  # fmt: skip
_IN_ROWS = {"floor_ratio": _MEASURED, "shares": _MEASURED, "samples": list, "wall_samples": list}


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: not JSON, perhaps cut short ({error}); measure again") from None
    check(result, str(path))
    return result


def check(result: Any, name: str) -> None:
    """Raise ResultError unless `result` has the fields and types of its kind."""
    if not isinstance(result, dict):
        raise ResultError(f"{name}: expected an object, got {type(result).__name__}")
    kind = result.get("kind")
    if kind not in KINDS:
        raise ResultError(f"{name}: kind: expected one of {sorted(KINDS)}, got {kind!r}")
    if result.get("schema") != SCHEMA:
        raise ResultError(f"{name}: schema: expected {SCHEMA}, got {result.get('schema')!r}; measure again")
    file_fields, row_fields = KINDS[kind]
    _check_fields(result, file_fields, name)
    for index, row in enumerate(result.get("rows", [])):
        place = f"{name}: rows[{index}]"
        _check_object(row, row_fields, place)
        if kind == "prefill":
            _check_fields(row, {field: type_ for field, type_ in OPTIONAL.items() if field in row}, place)
            for field, type_ in _IN_ROWS.items():
                inner = row.get(field, {})
                _check_fields(inner, dict.fromkeys(inner, type_), f"{place}: {field}")
            for stage, series in (*row["samples"].items(), *row.get("wall_samples", {}).items()):
                _check_fields(
                    dict(enumerate(series)), dict.fromkeys(range(len(series)), _MEASURED), f"{place}: {stage}"
                )
    for field, fields in LISTED.items() if kind == "prefill" else ():
        for index, entry in enumerate(result.get(field, [])):
            _check_object(entry, fields, f"{name}: {field}[{index}]")


def _check_object(value: Any, fields: dict[str, Any], name: str) -> None:
    if not isinstance(value, dict):
        raise ResultError(f"{name}: expected an object, got {type(value).__name__}")
    _check_fields(value, fields, name)


def _check_fields(values: dict[str, Any], fields: dict[str, Any], name: str) -> None:
    for field, expected in fields.items():
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if field not in values:
            raise ResultError(f"{name}: {field}: missing")
        value = values[field]
        fits = any(
            value is None if kind is None
            else isinstance(value, (int, float)) and not isinstance(value, bool) if kind is float
            else isinstance(value, kind) and not (kind is int and isinstance(value, bool))
            for kind in kinds
        )  # fmt: skip
        if not fits:
            wanted = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
            raise ResultError(f"{name}: {field}: expected {wanted}, got {value!r}")
