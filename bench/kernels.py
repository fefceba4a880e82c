"""The kernel table: every stage of the projector and the chain, this library against its rivals, on this GPU.

    python -m bench.kernels [--batch N ...] [--dtype bfloat16 float16] [--json FILE] [--budget SECONDS]

A result is compared with float64 before its time is taken: more than twice the eager form's error (plus 1e-6), an
element never written or a value that is not finite, and the row has no time. What is timed, and how, is in coldtime.py;
in which order, and so what a short budget leaves out, in plan.py.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import entry
from .arguments import positive_float, positive_int, writable_file
from .plan import STAGES, Step, plan

BATCHES = (1, 8, 2, 32, 4, 64, 16)  # of each kind of steps in this order: the budget may end the list
DTYPES = ("bfloat16", "float16", "float32")
TANH_ERROR = 5e-3  # tanh GELU against erf GELU on unit normal data, in the norm


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time the projector on a GPU.")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=list(BATCHES), metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float16"])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="default: .work/results/<device>/")
    parser.add_argument("--budget", type=positive_float, default=900.0, metavar="SECONDS")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--warm", action="store_true", help="only compile the Triton kernels, into Triton's cache")
    parser.add_argument("--small", action="store_true", help="a toy, on any device; times mean nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if not torch.cuda.is_available() and not args.small:
        print("python -m bench.kernels: error: no GPU here (--small tries the program)", file=sys.stderr)
        return 2
    from . import environment, results

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path: Path = args.json or environment.results_folder(device) / "kernels.json"
    if args.warm:
        return warm(args, device)
    result: dict[str, Any] = {}
    try:
        measure(args, device, result, lambda: results.write(path, result))
    except KeyboardInterrupt:
        if result:
            results.write(path, result)  # the rows of the step that was under way, too
        print(f"\ninterrupted; {path} keeps what was measured", file=sys.stderr)
        return 130
    results.check(result, str(path))
    results.write(path, result)
    print(report(result))
    print(f"\n{path}")
    # A rival that does not run here is a row that says so; one of our own paths that fails is a failure.
    return 1 if any(row["failed"] and row["provider"].startswith("stf") for row in result["rows"]) else 0


def warm(args: argparse.Namespace, device: str) -> int:
    """Call every own path once. Other processes then find its kernels in Triton's cache on disk."""
    import torch

    for step in plan(args.stage, args.batch, args.dtype, compiled=False):
        operands = build(step, device, small=args.small)
        with torch.set_grad_enabled(step.run != "forward"):
            for provider in (p for p in of_step(step, operands) if p.name.startswith("stf")):
                with contextlib.suppress(Exception):  # the table will say what does not run
                    provider.call()
        del operands
    return 0


def measure(args: argparse.Namespace, device: str, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure into `result`, calling `save` after every step."""
    import torch

    from . import environment
    from .coldtime import Flush
    from .goals import standing
    from .problems import LLAVA, SMALL
    from .progress import Progress
    from .roofline import measure_ceilings

    began = time.monotonic()
    sizes = SMALL if args.small else LLAVA
    torch.backends.cudnn.benchmark = True  # the convolution rival gets its best algorithm
    ceilings = measure_ceilings(device, size=512 if args.small else None)
    result |= {
        "schema": 1, "kind": "kernels", "complete": False, **environment.describe(device),
        "sizes": "small" if args.small else "llava-1.5-7b", "ceilings": ceilings.as_dict(),
        "command": ["python", "-m", "bench.kernels", *sys.argv[1:]], "rows": [], "notes": [],
    }  # fmt: skip
    steps = plan(args.stage, args.batch, args.dtype, compiled=not args.no_compile)
    bench, left = Bench(device, sizes, ceilings, Flush(device), result, began + args.budget), []
    with Progress(len(steps)) as bar:
        for step in steps:
            if time.monotonic() - began + step.seconds > args.budget:
                left.append(str(step))
                continue
            bar.now(str(step))
            try:
                bench.step(step, build(step, device, small=args.small))
            except torch.OutOfMemoryError:
                result["notes"].append(f"does not fit into memory: {step}")
            if device == "cuda":
                torch.cuda.empty_cache()
            bar.step()
            save()
        bar.finish("done")
    if left:
        result["not_measured"] = left
        result["notes"].append(f"out of time: {len(left)} of {len(steps)} steps not measured, first: {left[0]}")
    result["complete"] = not result["notes"]
    result["standing"] = standing(result)
    result["clock_mhz_after"] = environment.clock_mhz() if device == "cuda" else None


def build(step: Step, device: str, *, small: bool) -> Any:
    """The operands of a step, without gradients unless its pass has a backward."""
    import torch

    import stf_kernels

    from .operands import Operands
    from .problems import LLAVA, SMALL, build_projector

    sizes, dtype = SMALL if small else LLAVA, getattr(torch, step.dtype)
    projector = build_projector(sizes, stf_kernels.CompactTokenProjector, device=device, dtype=dtype, seed=1)
    with torch.no_grad():
        operands = Operands(projector.requires_grad_(False), sizes, step.batch, device=device, dtype=dtype)
    if step.run != "forward":
        operands.require_grad()
    return operands


def of_step(step: Step, operands: Any) -> list[Any]:
    """The providers that a step measures."""
    from . import providers

    if step.part == "own":
        return providers.own_providers(step.stage, operands)
    if step.part == "paths":
        found = providers.providers(step.stage, operands)
    else:
        found = [providers.compiled_provider(step.part, step.stage, operands)]
    return found if step.run == "forward" else providers.with_backward(found, step.stage, operands)


class Bench:
    """One step: check and time each of its providers, append their rows."""

    def __init__(
        self, device: str, sizes: Any, ceilings: Any, flush: Any, result: dict[str, Any], until: float
    ) -> None:
        self.device, self.sizes, self.until = device, sizes, until
        self.ceilings, self.flush, self.rows, self.notes = ceilings, flush, result["rows"], result["notes"]

    def step(self, step: Step, operands: Any) -> None:
        import torch

        from .providers import providers, with_backward

        backward = step.run != "forward"
        eager = providers(step.stage, operands)[:1]
        with torch.set_grad_enabled(backward):
            exact = operands.exact(step.stage, backward=backward)
            [eager] = with_backward(eager, step.stage, operands) if backward else eager
            allowed = 2 * self.error(eager, exact) + 1e-6
            for provider in of_step(step, operands):
                # Kernels are compiled at their first call: one step may take many times what the next one does.
                if time.monotonic() > self.until:
                    self.notes.append(f"not measured, out of time: {step}: {provider.name} and what follows")
                    return
                self.row(step, provider, exact, allowed)

    def error(self, provider: Any, exact: Any) -> float:
        from .agreement import relative_error

        poison(self.device, exact.numel())
        return relative_error(provider.layout(provider.call()), exact)

    def row(self, step: Step, provider: Any, exact: Any, allowed: float) -> None:
        from dataclasses import asdict

        from .coldtime import Times, time_call
        from .memory import MB, peak_bytes
        from .rivals import TANH

        row: dict[str, Any] = {"stage": step.stage, "batch": step.batch, "dtype": step.dtype,
                               "provider": provider.name, "pass": step.run, "failed": None}  # fmt: skip
        times, error, peak = Times(), None, None
        if provider.name == TANH:
            allowed += TANH_ERROR * (2 if step.stage == "chain" else 1)  # there both of its stages are
        try:
            error = self.error(provider, exact)
            if not error <= allowed:
                row["failed"] = f"wrong: error {error:.1e} against float64, allowed {allowed:.1e}"
                error = error if error == error and error != float("inf") else None
            else:
                times = time_call(provider.call, self.device, self.flush, seconds=0.1)
                peak = peak_bytes(provider.call, self.device)[1] / MB
        except Exception as failure:  # one provider that does not run here must not cost the others' rows
            row["failed"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
        self.rows.append({**row, "rel_error": error, "allowed_error": allowed, "peak_mb": peak, **self.floor(step),
                          **asdict(times)})  # fmt: skip

    def floor(self, step: Step) -> dict[str, float]:
        """Backward adds dW of every stage, and dX of all but the first: the tower is frozen."""
        from .problems import STAGES as GEMMS

        item = 4 if step.dtype == "float32" else 2
        parts = GEMMS if step.stage == "chain" else (step.stage,)
        seconds = 0.0
        for s in parts:
            products = 1 if step.run == "forward" else 2 if s == "G1" else 3
            once = self.ceilings.seconds(self.sizes.flops(s, step.batch), self.sizes.bytes(s, step.batch, item))
            seconds += products * once
        return {"floor_us": 1e6 * seconds}


def poison(device: str, elements: int) -> None:
    """Leave NaN in memory that the next allocation of this size is likely to get: what is not written shows."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        torch.full((elements,), float("nan"), dtype=dtype, device=device)


def report(result: dict[str, Any]) -> str:
    """The table, with every provider's ratio to eager and to the floor: losses as they are."""
    from .table import number, render

    base = {
        (r["pass"], r["stage"], r["batch"], r["dtype"]): r["us"] or r["us_eager"]
        for r in result["rows"] if r["provider"] == "eager"
    }  # fmt: skip
    lines = []
    for r in sorted(result["rows"], key=lambda r: (r["dtype"], r["pass"], STAGES.index(r["stage"]), r["batch"])):
        key, own = (r["pass"], r["stage"], r["batch"], r["dtype"]), r["us"] or r["us_eager"]
        eager = base.get(key)
        lines.append((
            r["stage"] + (" f+b" if r["pass"] != "forward" else ""), r["provider"], r["dtype"], str(r["batch"]),
            number(r["us"]), number(r["us_eager"]), number(r["us_host"]), number(r["floor_us"]),
            f"{own / r['floor_us']:.2f}" if own else "-", f"{eager / own:.2f}x" if own and eager else "-",
            number(r["peak_mb"]),
            "-" if r["rel_error"] is None else f"{r['rel_error']:.1e}", r["failed"] or r["not_captured"] or "",
        ))  # fmt: skip
    header = (
        "stage", "provider", "dtype", "batch", "us", "us eager", "us host", "floor", "x floor", "vs eager",
        "peak MB", "error", "",
    )  # fmt: skip
    head = f"{result['device']}   torch {result['torch']}, triton {result['triton']}, commit {result['commit'][:12]}"
    return "\n".join(["", head, "", render(header, lines, left=3), *result["standing"],
                      *(f"note: {note}" for note in result["notes"])])  # fmt: skip


if __name__ == "__main__":
    entry.run(main)
