"""What the commands share: values checked before torch is imported, progress, tables."""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stf_kernels.command import BadInput as BadInput
from stf_kernels.command import run as run


def patient(seconds: float) -> float:
    """`seconds` of an idle machine: as many times more as processes want each core now."""
    return seconds * max(1.0, os.getloadavg()[0] / os.cpu_count())


def positive(kind: type) -> Callable[[str], float]:
    """The type of an option: a finite int or float above 0."""

    def convert(text: str) -> float:
        try:
            if 0 < (value := kind(text)) < float("inf"):
                return value
        except ValueError:
            pass
        what = "whole number of at least 1" if kind is int else "number above 0"
        raise argparse.ArgumentTypeError(f"expected a {what}, got {text!r}")

    return convert


def writable_file(text: str) -> Path:
    """A path whose folder exists and takes a new file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file inside it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({error.strerror})") from None


def model_folder(text: str) -> Path:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} has no config.json; give the folder of a checkpoint")
    return Path(text)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """On stderr: rich's bar in a terminal, a line per step elsewhere. Drawn between measurements, by no thread.

    What it gives says what begins: one of `total`.
    """
    from rich.console import Console
    from rich.progress import Progress

    console, start = Console(stderr=True), time.monotonic()
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def step(text: str) -> None:
            if bar.disable:
                print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)
            bar.update(task, advance=1, description=text, refresh=True)

        yield step


def table(rows: Sequence[dict[str, str]], columns: Sequence[str] | None = None, *, left: int = 1) -> str:
    """`columns`, or all, of rows; as wide as it is, so that a pipe gets whole cells. The first `left` are text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = list(next(iter(rows), {})) if columns is None else columns
    drawn, text = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False), io.StringIO()
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(row[name] for name in columns))
    Console(file=text, width=1000, markup=False, highlight=False, color_system=None).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def number(value: float | None, digits: int = 1) -> str:
    """Thousands apart, "-" for what does not exist."""
    return "-" if value is None else f"{value:,.{digits}f}"
