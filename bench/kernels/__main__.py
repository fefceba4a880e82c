"""The kernel table: every product of the projector and the chain, this library against its rivals, on this GPU.

    python -m bench.kernels [--batch N ...] [--dtype bfloat16 float16] [--json FILE] [--budget SECONDS]

A result is compared with float64 before its time is taken: more than twice the eager form's error (plus 1e-6), an
element never written or a value that is not finite, and the row has no time. What is timed, and how, is in coldtime.py.
A budget may end the list: the chain comes first in each batch, and what torch.compile has to build comes last.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from .. import command
from ..command import positive_float, positive_int

STAGES = ("chain", "concat", "linear_merge", "linear", "linear_scatter")
BATCHES = [1, 8, 2, 32, 4, 64, 16]  # in this order
DTYPES = ("bfloat16", "float16", "float32")
NAME = "bench.kernels"
TRAINING = "forward+backward"


class Step(NamedTuple):
    """One set of operands, and what of it is measured."""

    slow: bool
    dtype: str
    batch: int
    stage: str
    run: str

    def __str__(self) -> str:
        return f"{self.stage} {self.run}, batch {self.batch}, {self.dtype}" + ", torch.compile" * self.slow


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Time the projector on a GPU.")
    parser.add_argument("--batch", type=positive_int, nargs="+", default=BATCHES, metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float16"])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--json", type=command.writable_file, metavar="FILE", help="default: .work/results/<device>/")
    parser.add_argument("--budget", type=positive_float, default=900.0, metavar="SECONDS")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--small", action="store_true", help="a toy, on any device; times mean nothing")
    return parser.parse_args(argv)


def steps(args: argparse.Namespace) -> list[Step]:
    """Forward + backward is of the chain alone: that is what trains."""
    slow = (False,) if args.no_compile else (False, True)
    every = itertools.product(slow, args.dtype, args.batch, args.stage, ("forward", TRAINING))
    return [step for step in itertools.starmap(Step, every) if step.stage == "chain" or step.run != TRAINING]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if not torch.cuda.is_available() and not args.small:
        return command.bad_input(NAME, "no GPU here (--small tries the program)")
    from .. import results
    from .table import report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, table = args.json or results.results_folder(device) / "kernels.json", Table(args, device)
    try:
        for _ in table.measure():
            results.write(path, table.result)
    except KeyboardInterrupt:
        results.write(path, table.result)  # the rows of the step that was under way, too
        print(f"\ninterrupted; {path} keeps what was measured", file=sys.stderr)
        return 130
    results.check(table.result, str(path))
    results.write(path, table.result)
    print(f"\n{report(table.result)}\n\n{path}")
    # A rival that does not run here is a row that says so; one of our own paths that fails is a failure.
    return 1 if any(row["failed"] and row["provider"].startswith("stf") for row in table.result["rows"]) else 0


class Table:
    """Measures into `result`."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        import torch

        from stf_kernels.tune.timing import Flush

        from .. import results, roofline
        from .problems import LLAVA, SMALL

        self.device, self.steps, self.until = device, steps(args), time.monotonic() + args.budget
        self.sizes = SMALL if args.small else LLAVA
        torch.backends.cudnn.benchmark = True  # the convolution rival gets its best algorithm
        self.ceilings = roofline.measure_ceilings(device, side=512 if args.small else None)
        self.flush = Flush(device)
        self.result = results.describe("kernels", device) | {
            "sizes": "small" if args.small else "llava-1.5-7b",
            "ceilings": asdict(self.ceilings),
            "command": ["python", "-m", NAME, *sys.argv[1:]],
            "rows": [],
            "not_measured": [],
        }

    def measure(self) -> Iterator[Step]:
        """Yields after every step."""
        import torch

        from .problems import Operands

        left, notes = self.result["not_measured"], self.result["notes"]
        with command.Progress(len(self.steps)) as bar:
            for step in self.steps:
                if time.monotonic() > self.until:
                    left.append(str(step))
                    continue
                bar.now(str(step))
                try:
                    dtype = getattr(torch, step.dtype)
                    with torch.no_grad():
                        operands = Operands(self.sizes, step.batch, device=self.device, dtype=dtype)
                    with torch.set_grad_enabled(step.run == TRAINING):
                        left += self.measure_step(step, operands)
                except torch.OutOfMemoryError:
                    notes.append(f"does not fit into memory: {step}")
                operands = None
                if self.device == "cuda":
                    torch.cuda.empty_cache()
                bar.step()
                yield step
        if left:
            notes.append(f"out of time: {len(left)} not measured, first: {left[0]}; --budget SECONDS raises it")
        self.result["complete"] = not notes

    def measure_step(self, step: Step, operands: Any) -> list[str]:
        """Append the rows of a step; what the budget did not reach is returned."""
        from .providers import PROVIDERS, of_stage

        trains, gpu = step.run == TRAINING, self.device == "cuda"
        operands.projector.requires_grad_(trains)
        exact = operands.exact(step.stage, gradients=trains)
        allowed = 2 * self.error(self.call(PROVIDERS["eager"], step, operands), exact) + 1e-6
        for name, provider in of_stage(step.stage, slow=step.slow, trains=trains, gpu=gpu).items():
            # Kernels are compiled at their first call: one provider may take many times what the next one does.
            if time.monotonic() > self.until:
                return [f"{step}: {name} and what follows"]
            merged = name.startswith("stf") and step.stage == "linear_merge"
            expected = self.merge(exact) if merged else exact
            bound = allowed + provider.extra_error * (2 if step.stage == "chain" else 1)
            row = {"stage": step.stage, "pass": step.run, "batch": step.batch, "dtype": step.dtype, "provider": name}
            row |= {"failed": None, "rel_error": None, "allowed_error": bound, "peak_mb": None, "samples": []}
            row |= {"floor_us": self.floor(step), "us": None, "us_eager": None, "not_captured": None}
            try:
                self.fill(row, self.call(provider, step, operands), expected)
            except Exception as failure:  # one provider that does not run here must not cost the others' rows
                row["failed"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
            if not (row["failed"] or "").startswith("NotImplementedError"):
                self.result["rows"].append(row)
        return []

    def call(self, provider: Any, step: Step, operands: Any) -> Any:
        call = provider.call(operands, step.stage)
        return (lambda: operands.gradients(call)) if step.run == TRAINING else call

    def merge(self, exact: Any) -> Any:
        from .problems import merge

        return merge(exact, self.sizes)

    def fill(self, row: dict[str, Any], call: Any, exact: Any) -> None:
        from ..meters import MB, peak_bytes
        from .coldtime import time_call

        error = self.error(call, exact)
        row["rel_error"] = error if math.isfinite(error) else None
        if error <= row["allowed_error"]:
            row |= time_call(call, self.device, self.flush, seconds=0.1)
            row["peak_mb"] = peak_bytes(call, self.device)[1] / MB
        else:
            row["failed"] = f"wrong: error {error:.1e} against float64, allowed {row['allowed_error']:.1e}"

    def error(self, call: Any, exact: Any) -> float:
        """Over memory that holds NaN: what is not written shows."""
        import torch

        from ..agreement import relative_error

        for dtype in (torch.float32, torch.bfloat16):
            torch.full((exact.numel(),), float("nan"), dtype=dtype, device=self.device)
        return relative_error(call(), exact)

    def floor(self, step: Step) -> float:
        """Backward adds dW of every product, and dX of all but the first: the tower is frozen."""
        item, total = 4 if step.dtype == "float32" else 2, 0.0
        for stage in STAGES[1:] if step.stage == "chain" else (step.stage,):
            count = 1 if step.run == "forward" else 2 if stage == "concat" else 3
            total += 1e6 * count * self.ceilings.seconds(self.sizes.work(stage, step.batch, item))
        return total


if __name__ == "__main__":
    command.run(main)
