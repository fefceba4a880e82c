"""Everything a GPU can prove, in one command under ten minutes: `make gpu` or `python3 -m bench.gpu`.

    tests.json     tests/gpu and every other test that needs no interpreter, on the device
    kernels.json   python -m bench.kernels
    prefill.json   python -m bench.prefill --preset 7b, eager and captured

Each part is a process with a time limit, its file is written as it measures, and a part that fails or hangs does not
take the others with it. The files go to bench/results/<device-slug>/, or to $OUT/<device-slug>/ where OUT is set.
Exit codes: 0 every part passed, 1 a part did not, 2 no GPU. Needs only what the machine has; the commit comes from
STF_COMMIT where there is no .git.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import positive_float

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "kernels", "prefill")
# Tests first, because a number from a wrong kernel is worth nothing. What a part leaves, the later ones share.
SECONDS = 545.0  # of all parts, the start of this program included; ten minutes is where a borrowed machine cuts off
SHARE = {"tests": 150.0, "kernels": 230.0, "prefill": 165.0}
GRACE = 10.0  # to save, for a part that was stopped
OPTIONAL = ("hypothesis", "peft", "accelerate", "sentencepiece")  # a GPU machine may lack them
NOT_ON_A_GPU = (
    "tests/interpreter",
    "tests/aot",
    "tests/bench",
    "tests/browser",
    "tests/project",
)  # other machines run these


@dataclass
class Part:
    """How one part ended."""

    name: str
    passed: bool
    seconds: float
    message: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests and measurements on this GPU.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; default: all")
    parser.add_argument("--scale", type=positive_float, default=1.0, metavar="F", help="multiply every time budget")
    args = parser.parse_args(argv)
    until = time.monotonic() + SECONDS * args.scale
    try:
        import torch
    except ImportError:
        return _no_gpu("torch is not installed for this python")
    if not torch.cuda.is_available():
        return _no_gpu(f"torch {torch.__version__} sees no GPU; without one, `make test` and `make prefill` run here")
    from . import environment

    out = os.environ.get("OUT")
    folder = (Path(out) if out else ROOT / "bench" / "results") / environment.slug(environment.device_name("cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"tests": run_tests, "kernels": run_kernels, "prefill": run_prefill}
    if environment.commit() == "unknown":
        print("STF_COMMIT is not set and there is no .git: the files will not say what was measured", file=sys.stderr)
    wanted, ended = [name for name in PARTS if name in args.only], []
    for index, name in enumerate(wanted):
        ended.append(attempt(name, runs[name], folder, share_of(until - time.monotonic(), wanted[index:])))
    print(f"\n{environment.device_name('cuda')}, results in {folder}")
    for part in ended:
        print(f"  {'passed' if part.passed else 'FAILED'}  {part.name:8} {part.seconds:4.0f} s  {part.message}")
    return 0 if all(part.passed for part in ended) else 1


def share_of(left: float, parts: Sequence[str]) -> float:
    """Seconds for the first of the parts that are still to run."""
    return max(0.0, left) * SHARE[parts[0]] / sum(SHARE[name] for name in parts)


def attempt(name: str, run: Callable[[Path, float], Part], folder: Path, seconds: float) -> Part:
    begin = time.monotonic()
    try:
        return run(folder, seconds)
    except Exception as error:  # a mistake in this program must not cost the parts behind it
        return Part(name, False, time.monotonic() - begin, f"{type(error).__name__}: {error}")


def _no_gpu(why: str) -> int:
    print(f"python -m bench.gpu: error: it needs a GPU: {why}", file=sys.stderr)
    return 2


def run_limited(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """(exit status, or None when it was stopped at the limit; the end of its output). Output is shown as it comes."""
    print(f"\n$ {' '.join(command)}   (at most {seconds:.0f} s)", flush=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: collections.deque[str] = collections.deque(maxlen=200)

    def show() -> None:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)

    # A thread reads on while the process is being stopped: one that waits for room in its pipe could not save.
    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    status = None
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)  # a measurement then writes what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        # Also what it has started: a child that keeps the pipe open would be waited for until the machine is taken.
        _signal(process, signal.SIGKILL)
        process.wait()
        reader.join(5)
    return status, "".join(lines)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run_tests(folder: Path, seconds: float) -> Part:
    from . import environment, results

    begin = time.monotonic()
    report = folder / "tests.xml"
    unavailable = tests_that_need(missing_packages())
    ignored = [f"--ignore={path}" for path in (*NOT_ON_A_GPU, *unavailable)]
    # A test that hangs leaves its stack in the output before the limit ends the run.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
               "-o", "faulthandler_timeout=40", *ignored]  # fmt: skip

    def run(arguments: list[str], limit: float, **environment: str) -> tuple[int | None, dict[str, Any], str]:
        report.unlink(missing_ok=True)  # a crash must not leave the other run's counts
        status, output = run_limited([*command, *arguments], max(10.0, limit), **environment)
        counts = read_junit(report)
        report.unlink(missing_ok=True)
        return status, counts, output

    # The device's own tests in a process of their own: a GPU fault in one must not count against the rest.
    status, device, output = run(["tests/gpu"], 0.7 * seconds)
    sanitizer = run_sanitizer(0.12 * seconds)
    workers = {"arguments": ["-n", "8"], "threads": "2"} if importlib.util.find_spec("xdist") else None
    rest_status, rest, rest_output = run(
        [*(workers["arguments"] if workers else []), "--ignore=tests/gpu", "--maxfail=20", "tests"],
        seconds - (time.monotonic() - begin), **({"OMP_NUM_THREADS": workers["threads"]} if workers else {}),
    )  # fmt: skip
    result: dict[str, Any] = {
        "schema": results.SCHEMA, "kind": "tests", "complete": status is not None and rest_status is not None,
        **environment.describe("cuda"),
        **{key: device[key] + rest[key] for key in ("passed", "failed", "skipped")},
        "failures": device["failures"] + rest["failures"], "device_tests": device, "other_tests": rest,
        "exit_status": {"tests/gpu": status, "tests": rest_status}, "compute_sanitizer": sanitizer,
        "not_run": {"other machines run these": list(NOT_ON_A_GPU), "a package is missing": unavailable},
        "output_tail": {"tests/gpu": output[-4000:], "tests": rest_output[-4000:]},
    }  # fmt: skip
    results.write(folder / "tests.json", result)
    passed = status == 0 and rest_status == 0 and device["passed"] > 0 and sanitizer.get("errors", 0) == 0
    message = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    for name, part in (("tests/gpu", device), ("tests", rest)):
        message += f"; {name}: crashed, no report" if part.get("missing") else ""
    if not result["complete"]:
        message += ", stopped at the time limit"
    return Part("tests", passed, time.monotonic() - begin, message)


def missing_packages() -> list[str]:
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def tests_that_need(packages: list[str]) -> list[str]:
    """Test files that import one of `packages`, relative to the checkout."""
    wanted = [re.compile(rf"^\s*(import|from) {name}\b", re.MULTILINE) for name in packages]
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}
    return [name for name, text in texts.items() if any(pattern.search(text) for pattern in wanted)]


def read_junit(path: Path) -> dict[str, Any]:
    """Counts and the names of what failed, from pytest's XML; zeros when a crash left none."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {**counts, "missing": True}
    for case in cases:
        tags = {child.tag for child in case}
        if tags & {"failure", "error"}:
            counts["failed"] += 1
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["skipped" if "skipped" in tags else "passed"] += 1
    return counts


def run_sanitizer(seconds: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck over one small projector, where the tool is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not on the PATH"}
    status, output = run_limited(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "bench.sanitize"], seconds
    )
    if status is None:
        return {"ran": False, "why": f"not finished after {seconds:.0f} s"}
    if status not in (0, 9):
        return {"ran": False, "why": f"exit status {status}", "tail": output[-1000:]}
    return {"ran": True, "errors": int(status == 9), "tail": output[-1000:]}


def run_kernels(folder: Path, seconds: float) -> Part:
    # A budget inside the limit: the program stops by itself before it is stopped.
    command = [sys.executable, "-m", "bench.kernels", "--json", str(folder / "kernels.json"),
               "--budget", f"{0.8 * seconds:.0f}"]  # fmt: skip
    return _measured("kernels", command, folder, seconds)


def run_prefill(folder: Path, seconds: float) -> Part:
    command = [sys.executable, "-m", "bench.prefill", "--preset", "7b", "--full", "--modes", "eager", "graph",
               "--json", str(folder / "prefill.json"), "--budget", f"{0.8 * seconds:.0f}"]  # fmt: skip
    return _measured("prefill", command, folder, seconds)


def _measured(name: str, command: list[str], folder: Path, seconds: float) -> Part:
    from . import results

    begin = time.monotonic()
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)  # an older file must not pass for this run's
    status, _ = run_limited(command, seconds)
    taken = time.monotonic() - begin
    try:
        rows = len(results.read(path)["rows"])
    except results.ResultError as error:
        return Part(name, False, taken, f"{error}; exit status {status}")
    how = {0: "", 1: ", see its output", None: ", stopped at the time limit"}.get(status, f", exit status {status}")
    return Part(name, status == 0, taken, f"{rows} rows{how}")


if __name__ == "__main__":
    sys.exit(main())
