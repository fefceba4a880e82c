"""One vLLM server with the OpenAI interface, in a process group that ends with the block."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

# No word to anybody outside, and on a CPU a cache that fits beside another server's; GPUs do not read it.
SETTINGS = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class ServerError(RuntimeError):
    """A server that ended before it answered; the message is the last error that it wrote."""


@contextlib.contextmanager
def serve(folder: Path, *options: str, log: Path, patience: float = 300) -> Iterator[str]:
    """Start one, wait for its first answer -> its address; end it and every process that it started.

    options: vLLM's own. Raises ServerError, also after `patience` seconds without an answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *options]
    with log.open("wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=SETTINGS | os.environ, start_new_session=True, **streams)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + patience
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"{folder}: no server: {_last_error(log)}; its whole output is in {log}")
            time.sleep(0.2)
        yield url
    finally:
        _end(process)


def _answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def _last_error(log: Path) -> str:
    errors = re.findall(r"(?:^|\s)\w+(?:Error|Exception): .*", log.read_text(encoding="utf-8", errors="replace"))
    return errors[-1].strip() if errors else "it said nothing"


def _end(process: subprocess.Popen) -> None:
    """A word, twenty seconds, and then the whole group: a worker outlives its server where that was killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
