"""Steps in their order: operands, float64, agreement, time; one row for every provider.

us is of the call captured as a CUDA graph, us_eager of the call as it is, on an idle device; before either the L2 is
flushed (stf_kernels/ops/first_use.py). On a CPU only us_eager remains, with warm caches.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import stf_kernels
from stf_kernels.ops.first_use import Flush, in_turns

from .. import results, roofline
from ..command import progress
from ..meters import MB, milliseconds, peak_bytes, relative_error
from ..results import first_line
from ..stats import spread_percent
from .problems import LLAVA, PRODUCTS, SMALL, Operands, flat, merge
from .providers import PROVIDERS, Provider, of_stage


class Run:
    """Measures into `result`, which is in its file after every row."""

    def __init__(self, steps: list[Any], device: str, path: Path, *, small: bool, seconds: float) -> None:
        self.steps, self.device, self.path, self.until = steps, device, path, time.monotonic() + seconds
        self.sizes, self.flush = SMALL if small else LLAVA, Flush(device)
        torch.backends.cudnn.benchmark = True  # the convolution rival gets its best algorithm
        self.ceilings = roofline.measure_ceilings(device, side=512 if small else None)
        self.result = results.describe("kernels", device) | {
            "sizes": "small" if small else "llava-1.5-7b",
            "ceilings": asdict(self.ceilings),
            "rows": [],
        }

    def measure(self) -> None:
        notes = self.result["notes"]
        with progress(len(self.steps)) as begin:
            for step in self.steps:
                begin(str(step))
                try:
                    with torch.set_grad_enabled(step.trains):
                        self.take(step)
                except TimeoutError as late:
                    notes.append(f"out of time: {late} and what follows are not measured; --budget SECONDS raises it")
                    break
                except torch.OutOfMemoryError:
                    notes.append(f"does not fit into memory: {step}")
                if self.device == "cuda":
                    torch.cuda.empty_cache()
        self.result["complete"] = not notes
        results.check(self.result, str(self.path))
        results.write(self.path, self.result)

    def take(self, step: Any) -> None:
        """Append the rows of a step; TimeoutError names the first that the budget did not reach."""
        grid, trains, item = (self.sizes.side, self.sizes.side), step.trains, 4 if step.dtype == "float32" else 2
        if time.monotonic() > self.until:
            raise TimeoutError(step)
        operands = Operands(self.sizes, step.batch, device=self.device, dtype=getattr(torch, step.dtype))
        operands.projector.requires_grad_(trains)
        stf_kernels.prepare(operands.projector, batch_sizes=(step.batch,), training=trains, grid=grid)
        exact = operands.exact(step.stage, gradients=trains)

        def call_of(provider: Provider) -> Callable[[], Any]:
            call = provider.call(operands, step.stage)
            return (lambda: operands.gradients(call)) if trains else call

        # In fp32 no less than one long sum rounds to: a library that shares it out over K is more exact.
        least = 2.5e-6 if step.dtype == "float32" else 0.0
        allowed = 2 * max(self.error(call_of(PROVIDERS["eager"]), exact), least) + 1e-6
        floor = 0.0
        for part in PRODUCTS if step.stage == "chain" else (step.stage,):
            # Backward adds dW of every product, and dX of all but the first: the tower is frozen.
            count = 1 if not trains else 2 if part == "concat" else 3
            floor += 1e6 * count * self.ceilings.seconds(self.sizes.work(part, step.batch, item))
        place = {"stage": step.stage, "pass": step.run, "batch": step.batch, "dtype": step.dtype, "floor_us": floor}
        for name, provider in of_stage(step.stage, slow=step.slow, trains=trains, gpu=self.device == "cuda").items():
            # Kernels are compiled at their first call: one provider may take many times what the next one does.
            if time.monotonic() > self.until:
                raise TimeoutError(f"{step}: {name}")
            merged = name.startswith("stf") and step.stage == "linear_merge"
            bound = allowed + provider.extra_error * (2 if step.stage == "chain" else 1)
            row = {**place, "provider": name, "failed": None, "rel_error": None, "allowed_error": bound}
            row |= dict.fromkeys(("us", "us_eager", "peak_mb")) | {"samples": []}
            try:
                self.fill(row, call_of(provider), merge(exact, self.sizes) if merged else exact)
            except Exception as failure:  # one provider that does not run here must not cost the others' rows
                row["failed"] = first_line(failure)
            self.result["rows"].append(row)
            results.write(self.path, self.result)

    def fill(self, row: dict[str, Any], call: Callable[[], Any], exact: Tensor) -> None:
        error = self.error(call, exact)
        row["rel_error"] = error if math.isfinite(error) else None
        if error <= row["allowed_error"]:
            row |= time_call(call, self.device, self.flush)
            row["peak_mb"] = peak_bytes(call, self.device)[1] / MB
        else:
            row["failed"] = f"wrong: error {error:.1e} against float64, allowed {row['allowed_error']:.1e}"

    def error(self, call: Callable[[], Any], exact: Tensor) -> float:
        """Over memory that holds NaN: what is not written shows."""
        for dtype in (torch.float32, torch.bfloat16):
            torch.full((exact.numel(),), float("nan"), dtype=dtype, device=self.device)
        return relative_error(flat(call()), exact)


def capture(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The kernels of one call, as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def time_call(call: Callable[[], Any], device: str, flush: Flush) -> dict[str, Any]:
    """Microseconds, 50 repeats each way, or 10 on a CPU."""
    for _ in range(3):
        call()
    gpu, times, eager = device.startswith("cuda"), {}, []
    if gpu:
        samples = in_turns([capture(call).replay], flush, 55)[0][5:]  # the first ones warm up
        times = {"us": median(samples), "samples": samples, "spread_percent": spread_percent(samples)}
    for _ in range(50 if gpu else 10):
        flush()
        eager.append(1e3 * milliseconds(call, device))
    return {**times, "us_eager": median(eager)}
