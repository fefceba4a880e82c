"""Processes with a time limit, one or several at once, each with all that it has started."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # to save, for a process that was stopped
_running: set[subprocess.Popen] = set()


@contextlib.contextmanager
def at_once(most: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Threads in which `run_limited` runs processes side by side; an interruption ends them all."""
    with concurrent.futures.ThreadPoolExecutor(most) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                _signal(process, signal.SIGKILL)
            raise


def run_limited(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """(exit status, or None when it was stopped at the limit; the end of its output). Output is shown as it comes."""
    print(f"\n$ {' '.join(command)}   (at most {seconds:.0f} s)", flush=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    _running.add(process)
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
        _running.discard(process)
        reader.join(5)
    return status, "".join(lines)


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
