"""What the commands share: values checked before torch is imported, progress, tables."""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stf_kernels.command import run

__all__ = ["Progress", "bad_input", "number", "positive_float", "positive_int", "run", "table", "writable_file"]


def bad_input(command: str, message: str) -> int:
    print(f"python -m {command}: error: {message}", file=sys.stderr)
    return 2


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def writable_file(text: str) -> Path:
    """A path whose folder exists and takes a new file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file inside it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist; make it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({error.strerror})") from None


class Progress:
    """On stderr: rich's bar in a terminal, a line per step elsewhere. Drawn between measurements, by no thread."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console, now = Console(stderr=True), TextColumn("{task.fields[now]}")
        columns = (TextColumn("{task.percentage:3.0f}%"), BarColumn(24), TimeElapsedColumn(), now)
        self.bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total, now="")
        self.start = time.monotonic()

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, text: str) -> None:
        """Say what begins: one of `total`."""
        if self.bar.disable:
            print(f"[{time.monotonic() - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)
        self.bar.update(self.task, advance=1, now=text, refresh=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table as wide as it is, so that a pipe gets whole cells. The first `left` columns are text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn, text = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False), io.StringIO()
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    Console(file=text, width=1000, markup=False, highlight=False, color_system=None).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def number(value: float | None, digits: int = 1) -> str:
    """Thousands apart, "-" for what does not exist."""
    return "-" if value is None else f"{value:,.{digits}f}"
