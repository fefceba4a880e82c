"""The tests of `make gpu`, in several processes: most of a kernel's first run is its compiler's, on one core.

tests/gpu first, in processes of its own: a GPU fault in one must not count against the rest. Beside it other processes
compile what the sanitizer and the kernel table will launch, into Triton's cache on disk. Then compute-sanitizer where
it is installed, then every other test that needs no interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import processes
from .processes import ROOT

OPTIONAL = ("hypothesis", "peft", "accelerate", "sentencepiece")  # a GPU machine may lack them
NOT_ON_A_GPU = (
    "tests/interpreter",
    "tests/aot",
    "tests/bench",
    "tests/browser",
    "tests/project",
)  # other machines run these
# Six of them, each with a 7B projector in float64 (7 GB), and the compilers beside them fit a GPU of 80 GB.
WORKERS = max(1, min(6, (os.cpu_count() or 1) // 2))
COUNTS = ("passed", "failed", "skipped")


def run_tests(folder: Path, seconds: float) -> tuple[bool, str, dict[str, Any]]:
    """(whether all passed, what to say, fields of tests.json)."""
    begin = time.monotonic()
    unavailable = tests_that_need(missing_packages())
    ignored = [f"--ignore={path}" for path in (*NOT_ON_A_GPU, *unavailable)]
    commands = compilations()
    with processes.at_once(max(1, len(commands))) as pool:
        ahead = [pool.submit(processes.run_limited, command, 0.4 * seconds) for command in commands]
        device = run_shares(["tests/gpu"], folder, 0.6 * seconds)
        compiled = [compilation.result()[0] for compilation in ahead]
    sanitizer = run_sanitizer(0.15 * seconds)
    left = seconds - (time.monotonic() - begin)
    rest = run_shares([*ignored, "--ignore=tests/gpu", "--maxfail=20", "tests"], folder, max(10.0, left))
    runs = {"tests/gpu": device, "tests": rest}
    statuses = {name: run.pop("exit_status") for name, run in runs.items()}
    complete = all(None not in found for found in statuses.values())
    result = {
        "complete": complete, **{key: device[key] + rest[key] for key in (*COUNTS, "failures")},
        "device_tests": device, "other_tests": rest, "exit_status": statuses, "compute_sanitizer": sanitizer,
        "compiled_ahead": compiled,
        "not_run": {"other machines run these": list(NOT_ON_A_GPU), "a package is missing": unavailable},
    }  # fmt: skip
    message = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    for name, run in runs.items():
        message += f"; {name}: {run['missing']} of {WORKERS} processes left no report" if run["missing"] else ""
    if not complete:
        message += ", stopped at the time limit"
    clean = all(status == 0 for found in statuses.values() for status in found)
    return clean and device["passed"] > 0 and sanitizer.get("errors", 0) == 0, message, result


def compilations() -> list[list[str]]:
    """Commands that compile what later parts launch; their failures are those parts' to report."""
    if WORKERS == 1:
        return []
    python = [sys.executable, "-m"]
    warm = [*python, "bench.kernels", "--warm", "--stage"]
    tables = [[*warm, stage, "--dtype", "bfloat16"] for stage in ("chain", "G1", "G2", "G3", "G4")]
    return [*tables, [*warm, "chain", "--dtype", "float16"], [*python, "bench.sanitize"]]


def run_shares(arguments: Sequence[str], folder: Path, seconds: float) -> dict[str, Any]:
    """pytest in WORKERS processes, each with its share of the tests: counts, failures, statuses, ends of output."""

    def share(index: int) -> tuple[int | None, str, dict[str, Any]]:
        report = folder / f"tests-{index}.xml"
        report.unlink(missing_ok=True)  # a crash must not leave another run's counts
        # A test that hangs leaves its stack in the output before the limit ends the run.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                   "-o", "faulthandler_timeout=40", f"--share={index}/{WORKERS}", *arguments]  # fmt: skip
        status, output = processes.run_limited(command, seconds, OMP_NUM_THREADS="2")
        counts = read_junit(report)
        report.unlink(missing_ok=True)
        return status, output, counts

    with processes.at_once(WORKERS) as pool:
        ended = list(pool.map(share, range(WORKERS)))
    return {
        **{key: sum(counts[key] for *_, counts in ended) for key in COUNTS},
        "failures": [failure for *_, counts in ended for failure in counts["failures"]],
        "missing": sum(bool(counts.get("missing")) for *_, counts in ended),
        "exit_status": [status for status, *_ in ended],
        "output_tails": [output[-2000:] for status, output, _ in ended if status != 0],
    }


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
    status, output = processes.run_limited(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "bench.sanitize"], seconds
    )
    if status is None:
        return {"ran": False, "why": f"not finished after {seconds:.0f} s"}
    if status not in (0, 9):
        return {"ran": False, "why": f"exit status {status}", "tail": output[-1000:]}
    return {"ran": True, "errors": int(status == 9), "tail": output[-1000:]}
