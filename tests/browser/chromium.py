"""A headless Chromium without a network, driven over its debugging pipe: no package and no port needed.

Messages are JSON, each ended by a zero byte: commands to its file descriptor 3, answers and events from 4.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    # Nothing listens there: whatever a page loads over a network fails, and is seen to.
    "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>", "--remote-debugging-pipe",
)  # fmt: skip
SECONDS = 60.0


class Chromium:
    """One browser with one page."""

    def __init__(self, program: str, profile: Path) -> None:
        self.command = [program, *FLAGS, f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            self.command.append("--no-sandbox")  # Chromium refuses a sandbox to root
        self.count, self.pending, self.events = 0, b"", []

    def __enter__(self) -> Chromium:
        # Far from 3 and 4, which the child puts in their places.
        (their_in, own_out), (own_in, their_out) = (map(_high, os.pipe()) for _ in range(2))

        def place() -> None:
            os.dup2(their_in, 3)
            os.dup2(their_out, 4)

        self.process = subprocess.Popen(
            self.command, preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(their_in)
        os.close(their_out)
        self.inward, self.outward = own_in, own_out
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.inward)
        os.close(self.outward)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.outward, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str, *, width: int, media: str = "screen") -> None:
        """Load a page at a width in CSS pixels; `events` then holds what happened since."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", media=media)
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())
        # Images given as data are decoded after the load event.
        self.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => 0)))")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    def _receive(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.inward], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.inward, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError(f"Chromium {'ended' if ready else f'said nothing for {SECONDS:.0f} s'}")
            self.pending += data
        message, self.pending = self.pending.split(b"\0", 1)
        return json.loads(message)


def _high(descriptor: int) -> int:
    """The same pipe end under a number of 10 or more."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return copy
