"""Compile what launches would need, many at once, without launching: for who is about to measure many configurations.

    with compiling_ahead():
        for config in configs:
            launch_stage(blocks, weight, bias, stage, config)     # returns at once; its result is memory never written

A kernel takes the compiler a second or more, most of it outside Python's lock. Within the block every launch hands its
kernel to a pool of threads instead; at its end all are compiled, and a launch finds them where the JIT keeps them.
What does not compile says so at its own launch.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

_state = threading.local()


@contextmanager
def compiling_ahead(threads: int | None = None) -> Iterator[None]:
    """Launches of this thread only compile. threads: of the pool, by default one for every core."""
    import triton

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        _state.active = True
        try:
            yield
        finally:
            _state.active = False


def is_compiling_ahead() -> bool:
    return getattr(_state, "active", False)
