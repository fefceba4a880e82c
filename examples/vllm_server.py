"""Start vLLM's server on a folder from Python, and end it with every process that it started:

    with serve(Path("llava-stf"), "--dtype", "bfloat16", log=Path("vllm.log")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

`python -m bench.serving` measures such servers.
"""

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

    options: vLLM's own. Raises ServerError, also after `patience` seconds of an idle machine without an answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where, *options]
    with log.open("wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=SETTINGS | os.environ, start_new_session=True, **streams)
    patience *= max(1.0, os.getloadavg()[0] / os.cpu_count())
    try:
        url, end, healthy = f"http://127.0.0.1:{port}", time.monotonic() + patience, False
        while not healthy:
            if process.poll() is not None or time.monotonic() > end:
                said = log.read_text(encoding="utf-8", errors="replace")
                errors = re.findall(r"(?:^|\s)\w+(?:Error|Exception): .*", said) or ["it said nothing"]
                raise ServerError(f"{folder}: no server: {errors[-1].strip()}; its whole output is in {log}")
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                healthy = urlopen(f"{url}/health", timeout=5).status == 200
        yield url
    finally:
        # A word, twenty seconds, and then the whole group: a worker outlives its server where that was killed.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
