"""The kernel table: every stage of the projector and the chain, this library against its rivals, on this GPU.

    python -m bench.kernels [--batch N ...] [--dtype bfloat16 float16] [--json FILE] [--budget SECONDS]

A result is compared with float64 before its time is taken: more than twice the eager form's error (plus 1e-6), an
element never written or a value that is not finite, and the row has no time. What is timed, and how, is in coldtime.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .arguments import positive_float, positive_int, writable_file

BATCHES = (1, 8, 2, 32, 4, 64, 16)  # the ones that goals are set for first: the budget may end the list
DTYPES = ("bfloat16", "float16", "float32")
STAGES = ("chain", "G1", "G2", "G3", "G4")
COMPILED = ((1, "chain"), (8, "chain"), (1, "G1"), (8, "G1"), (1, "G3"), (8, "G3"))
COMPILE_SECONDS = 60.0  # what one max-autotune may take: not begun with less left
BACKWARD = (1, 8, 32)
TANH_ERROR = 5e-3  # tanh GELU against erf GELU on unit normal data, in the norm


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time the projector on a GPU.")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=list(BATCHES), metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float16"])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="default: .work/results/<device>/")
    parser.add_argument("--budget", type=positive_float, default=900.0, metavar="SECONDS")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--small", action="store_true", help="a toy, on any device; times mean nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if not torch.cuda.is_available() and not args.small:
        print(
            "python -m bench.kernels: error: no GPU here (--small tries the program)",
            file=sys.stderr,
        )
        return 2
    from . import environment, results

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path: Path = args.json or environment.results_folder(device) / "kernels.json"
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


def plan(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """(what, batch, dtype): every forward stage of the first dtype, then backward, the other dtypes, torch.compile."""
    first, *others = args.dtype
    for batch in args.batch:
        yield "forward", batch, first
    for batch in args.batch:
        if batch in BACKWARD and "chain" in args.stage:
            yield "forward+backward", batch, first
    for dtype in others:
        for batch in args.batch:
            yield "forward", batch, dtype
    if not args.no_compile:
        for batch, stage in COMPILED:
            if batch in args.batch and stage in args.stage:
                yield f"compile {stage}", batch, first


def measure(args: argparse.Namespace, device: str, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Measure into `result`, calling `save` after every step."""
    import torch

    import stf_kernels

    from . import environment
    from .coldtime import Flush
    from .problems import LLAVA, SMALL, build_projector
    from .progress import Progress
    from .providers import Operands
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
    steps = list(plan(args))
    bench = Bench(args, device, sizes, ceilings, Flush(device), result, began + args.budget)
    with Progress(len(steps)) as bar, torch.no_grad():
        for what, batch, name in steps:
            reserve = COMPILE_SECONDS if what.startswith("compile") else 0.0
            if time.monotonic() - began + reserve > args.budget:
                result["notes"].append(f"not measured, out of time: {what}, batch {batch}, {name}")
                continue
            bar.now(f"{what}, batch {batch}, {name}")
            dtype = getattr(torch, name)
            try:
                projector = build_projector(
                    sizes, stf_kernels.CompactTokenProjector, device=device, dtype=dtype, seed=1
                )
                operands = Operands(projector.requires_grad_(False), sizes, batch, device=device, dtype=dtype)
                bench.step(what, operands, name)
            except torch.OutOfMemoryError:
                result["notes"].append(f"does not fit into memory: {what}, batch {batch}, {name}")
            projector = operands = None
            if device == "cuda":
                torch.cuda.empty_cache()
            bar.step()
            save()
        bar.finish("done")
    result["complete"] = not result["notes"]
    result["clock_mhz_after"] = environment.clock_mhz() if device == "cuda" else None


class Bench:
    """One step: check and time every provider of a stage, append its rows."""

    def __init__(
        self, args: Any, device: str, sizes: Any, ceilings: Any, flush: Any, result: dict[str, Any], until: float
    ) -> None:
        self.args, self.device, self.sizes, self.until = args, device, sizes, until
        self.ceilings, self.flush, self.rows, self.notes = ceilings, flush, result["rows"], result["notes"]

    def step(self, what: str, operands: Any, dtype: str) -> None:
        from .providers import compiled, providers

        if what == "forward+backward":
            return self.backward(operands, dtype)
        only = what.removeprefix("compile ") if what.startswith("compile") else None
        for stage in [only] if only else self.args.stage:
            exact = operands.exact(stage)
            found = providers(stage, operands)
            allowed = 2 * self.error(found[0], exact) + 1e-6  # eager is first
            for provider in [compiled(stage, operands)] if only else found:
                # Kernels are compiled at their first call: one step may take many times what the next one does.
                if time.monotonic() > self.until:
                    where = f"{what} {stage}, batch {operands.batch}, {dtype}"
                    self.notes.append(f"not measured, out of time: {where}, {provider.name} and what follows")
                    return None
                self.row(stage, operands.batch, dtype, provider, exact, allowed)
            del exact
        return None

    def error(self, provider: Any, exact: Any) -> float:
        from .agreement import relative_error

        poison(exact.shape, self.device, exact.numel())
        return relative_error(provider.layout(provider.call()), exact)

    def row(self, stage: str, batch: int, dtype: str, provider: Any, exact: Any, allowed: float) -> None:
        from dataclasses import asdict

        from .coldtime import Times, time_call
        from .providers import TANH

        row: dict[str, Any] = {"stage": stage, "batch": batch, "dtype": dtype, "provider": provider.name,
                               "pass": "forward", "failed": None}  # fmt: skip
        times, error = Times(), None
        if provider.name == TANH:
            allowed += TANH_ERROR
        try:
            error = self.error(provider, exact)
            if not error <= allowed:
                row["failed"] = f"wrong: error {error:.1e} against float64, allowed {allowed:.1e}"
                error = error if error == error and error != float("inf") else None
            else:
                times = time_call(provider.call, self.device, self.flush, seconds=0.1)
        except Exception as failure:  # one provider that does not run here must not cost the others' rows
            row["failed"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
        self.rows.append({**row, "rel_error": error, "allowed_error": allowed, **self.floor(stage, batch, dtype),
                          **asdict(times)})  # fmt: skip

    def floor(self, stage: str, batch: int, dtype: str, *, backward: bool = False) -> dict[str, float]:
        """Backward adds dW of every stage, and dX of all but the first: the tower is frozen."""
        from .problems import STAGES as GEMMS

        item = 4 if dtype == "float32" else 2
        parts = GEMMS if stage == "chain" else (stage,)
        seconds = 0.0
        for s in parts:
            products = 1 if not backward else 2 if s == "G1" else 3
            once = self.ceilings.seconds(self.sizes.flops(s, batch), self.sizes.bytes(s, batch, item))
            seconds += products * once
        return {"floor_us": 1e6 * seconds}

    def backward(self, operands: Any, dtype: str) -> None:
        """Forward + backward of the chain with a frozen tower: gradients of eight parameters. Not captured."""
        from dataclasses import asdict

        import torch

        from .agreement import relative_error
        from .coldtime import Times, median
        from .problems import eager_chain

        projector = operands.projector.requires_grad_(True)
        weights = [p for pair in operands.parameters.values() for p in pair]

        def gradients(forward: Callable[[], Any], leaves: list[Any]) -> list[Any]:
            with torch.enable_grad():
                return list(torch.autograd.grad(forward().float().square().mean(), leaves))

        def flat(found: list[Any]) -> Any:
            return torch.cat([g.double().flatten() for g in found])

        doubles = {k: [p.detach().double().requires_grad_() for p in pair] for k, pair in operands.parameters.items()}
        blocks = [block.double() for block in operands.blocks]
        leaves = [p for pair in doubles.values() for p in pair]
        exact = flat(gradients(lambda: eager_chain(blocks, doubles, self.sizes), leaves))
        calls = {
            "eager": lambda: gradients(lambda: eager_chain(operands.blocks, operands.parameters, self.sizes), weights),
            "stf": lambda: gradients(lambda: projector(operands.blocks), weights),
        }
        allowed = 2 * relative_error(flat(calls["eager"]()), exact) + 1e-6
        for name, call in calls.items():
            row: dict[str, Any] = {"stage": "chain", "batch": operands.batch, "dtype": dtype, "provider": name,
                                   "pass": "forward+backward", "failed": None}  # fmt: skip
            error, times = relative_error(flat(call()), exact), Times()
            if error <= allowed:
                times = self.uncaptured(call, median)
            else:
                row["failed"] = f"wrong gradients: error {error:.1e} against float64, allowed {allowed:.1e}"
                error = error if error == error and error != float("inf") else None
            self.rows.append({**row, "rel_error": error, "allowed_error": allowed,
                              **self.floor("chain", operands.batch, dtype, backward=True),
                              **asdict(times)})  # fmt: skip

    def uncaptured(self, call: Callable[[], Any], median: Callable) -> Any:
        from .coldtime import Times, eager_samples

        if self.device != "cuda":
            from .coldtime import time_call

            return time_call(call, self.device, self.flush, seconds=0.1)
        for _ in range(3):
            call()
        device, host = eager_samples(call, self.flush, 20)
        return Times(None, median(device), median(host), None, len(device), device)


def poison(shape: Any, device: str, elements: int) -> None:
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
    for r in result["rows"]:
        key, own = (r["pass"], r["stage"], r["batch"], r["dtype"]), r["us"] or r["us_eager"]
        eager = base.get(key)
        lines.append((
            r["stage"] + (" f+b" if r["pass"] != "forward" else ""), r["provider"], r["dtype"], str(r["batch"]),
            number(r["us"]), number(r["us_eager"]), number(r["us_host"]), number(r["floor_us"]),
            f"{own / r['floor_us']:.2f}" if own else "-", f"{eager / own:.2f}x" if own and eager else "-",
            "-" if r["rel_error"] is None else f"{r['rel_error']:.1e}", r["failed"] or "",
        ))  # fmt: skip
    header = (
        "stage", "provider", "dtype", "batch", "us", "us eager", "us host", "floor", "x floor", "vs eager", "error", "",
    )  # fmt: skip
    head = f"{result['device']}   torch {result['torch']}, triton {result['triton']}, commit {result['commit'][:12]}"
    return "\n".join(["", head, "", render(header, lines, left=3), *(f"note: {note}" for note in result["notes"])])


if __name__ == "__main__":
    sys.exit(main())
