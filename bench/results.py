"""Result files: where they were measured, written whole or not at all, refused when they are not what they say.

While a run is under way its file says `"complete": false`; an interrupted run leaves what it measured, marked so.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .command import BadInput

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
KINDS = ("host", "kernels", "prefill", "quality", "serving", "tests")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def write(path: Path, result: dict[str, Any]) -> None:
    """The whole result of an earlier run stays, as NAME.previous.json, until this one is whole, too."""
    from stf_kernels.configs.tables import write_json

    json.dumps(result, allow_nan=False)  # a NaN that reaches a table is a bug here, not in the reader
    previous, whole = path.with_suffix(".previous.json"), result.get("complete")
    with contextlib.suppress(BadInput):  # nothing there that is worth to be kept
        if not whole and read(path)["complete"]:
            os.replace(path, previous)
    write_json(path, result)
    if whole:
        previous.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The checked content of a result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # refuses NaN
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also of integers with thousands of digits
        raise BadInput(f"{path}: not JSON, perhaps cut short ({error}); measure again") from None
    check(result, str(path))
    return result


def check(result: Any, name: str) -> None:
    """Raise BadInput unless `result` has the fields and types of its kind."""
    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in KINDS:
        raise BadInput(f"{name}: kind: expected one of {list(KINDS)}, got {kind!r}")
    if result.get("schema") != SCHEMA:
        raise BadInput(f"{name}: schema: expected {SCHEMA}, got {result.get('schema')!r}; measure again")
    if not find_spec("jsonschema"):  # on a machine that only measures
        return
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    shapes = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))["$defs"]
    errors = Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": shapes}).iter_errors(result)
    if error := best_match(errors):
        place = error.json_path.removeprefix("$").removeprefix(".")
        raise BadInput(f"{name}: {place}: {error.message[:200]}")


def commit() -> str:
    """STF_COMMIT where there is no .git; else the checkout's commit, with "+dirty" when tracked files differ."""
    if given := os.environ.get("STF_COMMIT"):
        return given
    head, changed = _said_by("git", "rev-parse", "HEAD"), _said_by("git", "status", "--porcelain", "-uno")
    return head + "+dirty" * bool(changed) if head else "unknown"


def clock_mhz() -> float | None:
    """The SM clock of GPU 0 right now, or None where it cannot be asked."""
    said = _said_by("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0")
    with contextlib.suppress(ValueError):
        return float(said)
    return None


def _said_by(*command: str) -> str:
    """What it writes; "" where it does not run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return ""


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
    """Where a run's files go unless it is told: into the ignored `.work/`, so that no run dirties the checkout."""
    return ROOT / ".work" / "results" / folder_name(device)


def describe(kind: str, device: str) -> dict[str, Any]:
    """How every result file begins: what it is, and where it came from."""
    packages = ("torch", "triton", "transformers")
    versions = {package: metadata.version(package) if find_spec(package) else None for package in packages}
    clock = clock_mhz() if device.startswith("cuda") else None
    found = {"schema": SCHEMA, "kind": kind, "complete": False, "device": device_name(device), **versions}
    found["command"] = ["python", "-m", f"bench.{kind}", *sys.argv[1:]]
    return found | {"python": platform.python_version(), "commit": commit(), "clock_mhz": clock, "notes": []}
