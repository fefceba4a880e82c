"""How a command ends, whatever ends it: no traceback, no child left behind.

    Ctrl-C                         130, within two seconds, also while torch is imported; SIGTERM 143, SIGHUP 129
    stdout's reader is gone        141
    a disk is full                 74 (EX_IOERR), and a line that says so
    stderr's terminal is gone      nothing: the job goes on
    text stdout cannot encode      written with backslashes
    BadInput                       2, and its one line
    a package is missing or old    2, and the command that installs it

    if __name__ == "__main__":
        run(main)

main() returns the status. It parses first and imports torch inside, so that --help answers at once; it may catch
KeyboardInterrupt to save, in less than GRACE seconds, and starts worker processes inside `shielded()`.
"""

import atexit
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

GRACE = 1.5  # seconds to unwind; what takes longer, a long call into C++ among them, is cut short
_OWN = ("stf_kernels.", "llava_integration.", "bench.")
_LLAVA = ("transformers", "huggingface_hub", "PIL", "safetensors", "tqdm")  # what the extra brings
# `python -m` of a command: the packages then import when they are asked for a name, not at once.
STARTED = any(
    flag == "-m" and name.startswith(_OWN) for flag, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
)

_received: list[int] = []  # the signal that ends this process
_carried_on = threading.Event()


class BadInput(ValueError):
    """What was given cannot be used; the message names the option or the file, and what would do."""


class _OutputLost(BaseException):
    """Nobody takes what is written to stdout. No Exception: it is not for a command's own `except`."""


class _Stream(io.FileIO):
    """stdout or stderr: after the first failure it drops what it is given, so that nothing else fails on it."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
                if self.fileno() == 1:
                    _end_children(signal.SIGTERM)  # else a pool of workers finishes first
                    raise _OutputLost(error.errno) from None
        return len(data)


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with the status of `main`; see the top of this file for the others."""
    _open_streams()
    _handle_signals()
    try:
        status = _status(main)
        for number in _handled():
            signal.signal(number, _leave)  # nothing is at work any more
    except KeyboardInterrupt:
        status = 130
    with contextlib.suppress(_OutputLost):
        sys.stdout.flush()
    if _received:
        atexit._run_exitfuncs()
        _leave(_received[0])
    sys.exit(status)


def _leave(number: int, _frame: object = None) -> NoReturn:
    """At once: Python's own end takes torch apart first, and kills itself when C code has seen the interrupt."""
    _end_children(signal.SIGKILL)
    os._exit(128 + number)


def _status(main: Callable[[], int]) -> Any:
    try:
        try:
            status: Any = main()
        except SystemExit as end:  # argparse
            status = end.code
        sys.stdout.flush()
        return status
    except _OutputLost as lost:
        return 141 if lost.args[0] == errno.EPIPE else _say(f"stdout: {os.strerror(lost.args[0])}")
    except BadInput as error:
        return _say(str(error), 2)
    except ImportError as error:
        if _received or (sentence := missing(error)) is None:
            raise
        return _say(sentence, 2)
    except Exception as error:  # a BrokenProcessPool, say, of the workers that a signal ended
        if _received or os.strerror(errno.ENOSPC) in str(error):
            return _say(str(error))
        raise


def missing(error: ImportError) -> str | None:
    """What to install, in one sentence; None for a mistake of our own."""
    root = (error.name or "").partition(".")[0]
    if not root or f"{root}." in _OWN:
        return None
    wanted = "'stf-kernels[llava]'" if root in _LLAVA else root
    absent = isinstance(error, ModuleNotFoundError) and error.name == root
    what = "is not installed" if absent else f"is of a version that does not do ({str(error).partition(' (')[0]})"
    return f"{root} {what}: pip install --upgrade {wanted}"


def lazy(package: str, *homes: str) -> Callable[[str], object]:
    """The `__getattr__` of a package that has imported nothing yet: the first name brings all, from modules `homes`."""

    def find(name: str) -> object:
        module = sys.modules[package]
        if name not in module.__all__:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        for home in homes:
            found = vars(importlib.import_module(f"{package}.{home}"))
            vars(module).update({key: found[key] for key in module.__all__ if key in found})
        return vars(module)[name]

    return find


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside do not see Ctrl-C, whose traceback they would print: the command ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(message: str, status: int = os.EX_IOERR) -> int:
    if not _received:
        spec = sys.modules["__main__"].__spec__
        name = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
        print(f"python -m {name}: error: {message}", file=sys.stderr)
    return status


def _open_streams() -> None:
    while (hole := os.open(os.devnull, os.O_RDWR)) < 3:  # closed by `>&-`: a file must not become stdout
        pass
    os.close(hole)
    for number, name in ((1, "stdout"), (2, "stderr")):
        buffer = io.BufferedWriter(_Stream(number, "w", closefd=False))
        encoding, at_once = getattr(getattr(sys, name), "encoding", "utf-8"), number == 2 or os.isatty(number)
        text = io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=at_once)
        setattr(sys, name, text)


def _handled() -> list[int]:
    """Without what nohup or a shell's background job ignores."""
    every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in every if signal.getsignal(number) is not signal.SIG_IGN]


def _handle_signals() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    for number in _handled():
        signal.signal(number, _interrupt)
    sys.unraisablehook, threading.excepthook = _unraisable(sys.unraisablehook), _unraisable(threading.excepthook)
    os.register_at_fork(after_in_child=_forget)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code is _Stream.write.__code__:
            return  # what is written but not yet counted would be written again: `_watch` repeats the signal
        frame = frame.f_back
    if not _received:
        _received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit


def carry_on() -> None:
    """The interrupt that was caught ends something smaller than the command, an answer of a chat, say."""
    _received.clear()
    _carried_on.set()


def _watch(reading: int) -> None:
    """The thread that hears of a signal even while the main thread is inside a call that returns much later."""
    while True:
        if (number := os.read(reading, 1)[0]) not in _handled():
            continue
        _end_children(signal.SIGTERM)
        end = time.monotonic() + GRACE
        while not _carried_on.wait(0.05):
            if time.monotonic() > end:
                _leave(number)
            if not _received:
                signal.pthread_kill(threading.main_thread().ident, number)
        os.set_blocking(reading, False)  # what was repeated is not a signal of its own
        with contextlib.suppress(BlockingIOError):
            os.read(reading, 64)
        os.set_blocking(reading, True)
        _carried_on.clear()


def _unraisable(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """An interrupt that Python drops, in a destructor or a callback of C, is for `_watch` to repeat; threads fall
    silent."""

    def report(unraisable: Any) -> None:
        if not _received:
            hook(unraisable)
        elif issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
            _received.clear()

    return report


def _forget() -> None:
    """In a forked child, whose end is its parent's to bring."""
    signal.set_wakeup_fd(-1)
    for number in _handled():
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


def _end_children(number: int) -> None:
    for child in list(_descendants("self")):
        with contextlib.suppress(OSError):
            os.kill(child, number)


def _descendants(process: str) -> Iterator[int]:
    """Without multiprocessing's tracker, which ends by itself and clears up behind the others."""
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children") as file:
                for child in file.read().split():
                    with open(f"/proc/{child}/cmdline") as words:
                        tracker = "resource_tracker" in words.read()
                    yield from _descendants(child)
                    yield from [] if tracker else [int(child)]
