"""Everything a GPU can prove, in one command under ten minutes: `make gpu` or `python3 -m bench.gpu`.

    tests.json     tests/gpu, and every other test that needs no interpreter
    kernels.json   python -m bench.kernels
    prefill.json   python -m bench.prefill --preset 7b, eager and captured
    selection/     what both selected before they timed anything (stf_kernels.prepare)

The files go to bench/results/<device-slug>/, or to $OUT/<device-slug>/. Exit codes: 0 every part passed, 1 a part did
not, 2 no GPU. The commit is STF_COMMIT without a .git.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import command, results
from .results import ROOT

NAME = "bench.gpu"
PYTHON = [sys.executable, "-m"]
# Tests first, because a number from a wrong kernel is worth nothing.
SECONDS = {"tests": 180.0, "kernels": 210.0, "prefill": 165.0, "sanitizer": 300.0}
MEASURED = {
    "kernels": ["--batch", "1", "8", "--dtype", "bfloat16"],
    "prefill": ["--preset", "7b", "--full", "--modes", "eager", "graph"],
}
# Need no GPU, or the interpreter, which Triton 3.6 does not have for the numpy of a GPU machine.
ELSEWHERE = ["tests/interpreter", "tests/aot", "tests/bench", "tests/browser", "tests/project"]
ELSEWHERE += ["tests/convert", "tests/operators/test_attack.py"]
OPTIONAL = ("hypothesis", "peft", "accelerate", "sentencepiece")  # a GPU machine may lack them
WORKER_BYTES = 12 << 30  # of GPU memory that a process of tests/gpu takes: a 7B projector thrice, in float64 at last
COMPILING = 420.0  # core-seconds: tests/gpu compiles some 700 kernels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Tests and measurements on this GPU.")
    usual = [name for name in SECONDS if name != "sanitizer"]
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=usual, help="default: all but sanitizer")
    args = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        without = "without one, `make test` and `make prefill` run here"
        raise command.BadInput(f"it needs a GPU: torch {torch.__version__} sees none; {without}")
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results") / results.folder_name("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("STF_KERNELS_CACHE", str(folder / "selection"))  # the times that decided what ran
    if results.commit() == "unknown":
        print("set STF_COMMIT: without it and a .git the files do not say what was measured", file=sys.stderr)
    parts = {"tests": tests, **{name: partial(measured, name) for name in MEASURED}, "sanitizer": sanitized}
    every, lines = True, []
    for name in [name for name in parts if name in args.only]:
        began = time.monotonic()
        try:
            passed, said = parts[name](folder)
        except Exception as error:  # a mistake in this program must not cost the parts behind it
            passed, said = False, f"{type(error).__name__}: {error}"
        every &= passed
        lines.append(f"  {'passed' if passed else 'FAILED'}  {name:8} {time.monotonic() - began:4.0f} s  {said}")
    print(f"\n{results.device_name('cuda')}, results in {folder}", *lines, sep="\n")
    return 0 if every else 1


def run_limited(arguments: Sequence[str], seconds: float) -> int | None:
    """Exit status, or None when it was stopped at the limit."""
    print(f"\n$ {' '.join(arguments)}   (at most {seconds:.0f} s)", flush=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has started; a measurement has saved its last step
        process.wait()


def workers() -> int:
    """Processes of pytest: no more than cores, for most of a kernel's first run is its compiler's, or than memory has
    room for."""
    from .meters import available_bytes

    return max(1, min(os.cpu_count() or 1, available_bytes("cuda") // WORKER_BYTES))


def tests(folder: Path) -> tuple[bool, str]:
    """tests/gpu first, in processes of its own: a GPU fault in one must not count against the rest. Few cores make
    the compiler take longer than is meant for all."""
    seconds, began, count = SECONDS["tests"], time.monotonic(), workers()
    unavailable = tests_that_need([p for p in OPTIONAL if not importlib.util.find_spec(p)])
    device = run_pytest(["tests/gpu"], folder, max(0.6 * seconds, COMPILING / count), count)
    left = max(0.4 * seconds, seconds - time.monotonic() + began)
    ignored = [f"--ignore={path}" for path in (*ELSEWHERE, *unavailable, "tests/gpu")]
    rest = run_pytest([*ignored, "--maxfail=20", "tests"], folder, left, count)
    found: dict[str, Any] = {key: device[key] + rest[key] for key in ("passed", "failed", "skipped", "failures")}
    said = "{passed} passed, {failed} failed, {skipped} skipped".format(**found)
    found |= {"complete": None not in (device["status"], rest["status"]), "not_run": [*ELSEWHERE, *unavailable]}
    found |= {"device_tests": device, "other_tests": rest}
    results.write(folder / "tests.json", {**results.describe("tests", "cuda"), **found})
    said += ", stopped at the time limit" * (not found["complete"])
    return device["status"] == rest["status"] == 0 and device["passed"] > 0, said


def run_pytest(arguments: Sequence[str], folder: Path, seconds: float, count: int = 1) -> dict[str, Any]:
    """In `count` processes where pytest-xdist is installed -> counts, failures, exit status."""
    report = folder / "tests.xml"
    report.unlink(missing_ok=True)  # a crash must not leave another run's counts
    shared = ["-n", str(count)] if count > 1 and importlib.util.find_spec("xdist") else []
    # A test that hangs leaves its stack in the output before the limit ends the run.
    options = ["-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=40", f"--junitxml={report}", *shared]
    status = run_limited([*PYTHON, "pytest", *options, *arguments], seconds)
    found: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    try:
        for case in ElementTree.parse(report).iter("testcase"):
            ended = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
            found[ended].append(f"{case.get('classname')}::{case.get('name')}")
    except (OSError, ElementTree.ParseError):
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": ["no report was left"], "status": status}
    report.unlink()
    failures = found["failure"] + found["error"]
    counts = {"passed": len(found["passed"]), "failed": len(failures), "skipped": len(found["skipped"])}
    return counts | {"failures": failures, "status": status}


def sanitized(folder: Path) -> tuple[bool, str]:
    """compute-sanitizer ends with its own status for accesses out of bounds, else with the program's. What CUDA's
    calls return is no error here: Triton and torch ask what they may be refused, such as whose memory a pointer is."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        return False, "compute-sanitizer is not installed: it comes with CUDA's toolkit"
    quiet = [tool, "--report-api-errors", "no", "--error-exitcode", "99"]
    # Calls that are not captured: under the sanitizer torch's generator refuses a capture.
    status = run_limited([*quiet, *PYTHON, "pytest", "-q", "tests/gpu/test_gpu_kernels.py"], SECONDS["sanitizer"])
    said = {0: "nothing out of bounds", 99: "memory errors, see its output", None: "stopped at the time limit"}
    return status == 0, said.get(status, f"the program failed, exit status {status}")


def tests_that_need(packages: list[str]) -> list[str]:
    """Test files that import one of `packages`, relative to the checkout."""
    wanted = re.compile(rf"^\s*(import|from) ({'|'.join(packages)})\b", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py")) if packages else []
    return [str(file.relative_to(ROOT)) for file in files if wanted.search(file.read_text(encoding="utf-8"))]


def measured(name: str, folder: Path) -> tuple[bool, str]:
    path, seconds = folder / f"{name}.json", SECONDS[name]
    path.unlink(missing_ok=True)  # an older file must not pass for this run's
    # A budget inside the limit: the program stops by itself before it is stopped.
    arguments = [*MEASURED[name], "--json", str(path), "--budget", f"{0.8 * seconds:.0f}"]
    status = run_limited([*PYTHON, f"bench.{name}", *arguments], seconds)
    try:
        rows = len(results.read(path)["rows"])
    except command.BadInput as error:
        return False, f"{error}; exit status {status}"
    how = {0: "", 1: ", see its output", None: ", stopped at the time limit"}.get(status, f", exit status {status}")
    return status == 0, f"{rows} rows{how}"


if __name__ == "__main__":
    command.run(main)
