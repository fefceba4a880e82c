"""Everything a GPU can prove, in one command under ten minutes: `make gpu` or `python3 -m bench.gpu`.

    tests.json     tests/gpu and every other test that needs no interpreter, on the device
    kernels.json   python -m bench.kernels
    prefill.json   python -m bench.prefill --preset 7b, eager and captured

Each part is one or more processes with a time limit, its file is written as it measures, and a part that fails or
hangs does not take the others with it. The files go to bench/results/<device-slug>/, or to $OUT/<device-slug>/ where
OUT is set.
Exit codes: 0 every part passed, 1 a part did not, 2 no GPU. Needs only what the machine has; the commit comes from
STF_COMMIT where there is no .git.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import entry, processes
from .arguments import positive_float
from .processes import ROOT

PARTS = ("tests", "kernels", "prefill")
# Tests first, because a number from a wrong kernel is worth nothing. What a part leaves, the later ones share.
SECONDS = 545.0  # of all parts, the start of this program included; ten minutes is where a borrowed machine cuts off
SHARE = {"tests": 150.0, "kernels": 230.0, "prefill": 165.0}


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
    # Parts are stopped by SIGINT, and inherit from a shell's background job that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        import torch
    except ImportError:
        return _no_gpu("torch is not installed for this python")
    if not torch.cuda.is_available():
        return _no_gpu(f"torch {torch.__version__} sees no GPU; without one, `make test` and `make prefill` run here")
    from . import environment

    out = os.environ.get("OUT")
    folder = (Path(out) if out else ROOT / "bench" / "results") / environment.folder_name("cuda")
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


def run_tests(folder: Path, seconds: float) -> Part:
    from . import environment, gpu_tests, results

    begin = time.monotonic()
    passed, message, found = gpu_tests.run_tests(folder, seconds)
    described = {"schema": results.SCHEMA, "kind": "tests", **environment.describe("cuda")}
    results.write(folder / "tests.json", {**described, **found})
    return Part("tests", passed, time.monotonic() - begin, message)


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
    status, _ = processes.run_limited(command, seconds)
    taken = time.monotonic() - begin
    try:
        rows = len(results.read(path)["rows"])
    except results.ResultError as error:
        return Part(name, False, taken, f"{error}; exit status {status}")
    how = {0: "", 1: ", see its output", None: ", stopped at the time limit"}.get(status, f", exit status {status}")
    return Part(name, status == 0, taken, f"{rows} rows{how}")


if __name__ == "__main__":
    entry.run(main)
