"""Time of one call on a GPU whose L2 holds none of its operands.

    us        the call captured as a CUDA graph; the host queues flush, event, replay, event far ahead of the device
    us_eager  the call as it is: the device is idle when it begins, so launches and gaps between kernels count

How a captured call is timed, and what the flush is: stf_kernels/tune/timing.py. On a CPU only the plain clock remains,
with warm caches: us_eager.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from stf_kernels.tune.timing import Flush, capture, replay

from ..meters import Stopwatch, synchronize
from ..stats import spread_percent

WARM_UP = 3


def time_call(call: Callable[[], Any], device: str, flush: Flush, *, seconds: float) -> dict[str, Any]:
    """Microseconds, 5 to 100 repeats each way within about `seconds`; what cannot be captured says why."""
    for _ in range(WARM_UP):
        call()
    times, repeats = {"us": None, "samples": [], "not_captured": None}, 10
    if device.startswith("cuda"):
        try:
            graph = capture(call)
        except RuntimeError as error:
            times["not_captured"] = f"not captured: {(str(error).splitlines() or [''])[0][:200]}"
        else:
            begin = time.perf_counter()
            replay(graph, flush, 5)
            repeats = min(100, max(5, int(5 * seconds / 2 / (time.perf_counter() - begin))))
            samples = replay(graph, flush, repeats)
            times |= {"us": median(samples), "samples": samples, "spread_percent": spread_percent(samples)}
    return {**times, "us_eager": median(_eager(call, device, flush) for _ in range(repeats))}


def _eager(call: Callable[[], Any], device: str, flush: Flush) -> float:
    watch = Stopwatch(device)
    flush()
    synchronize(device)
    watch.mark("start")
    call()
    watch.mark("end")
    return 1e3 * watch.between("start", "end")
