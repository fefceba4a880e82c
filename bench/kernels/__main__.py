"""The kernel table: every product of the projector and the chain, this library against its rivals, on this GPU.

A result is compared with float64 before its time is taken: more than twice the eager form's error, an element never
written or a value that is not finite, and the row has no time. What torch.compile has to build comes last.
"""

import argparse
from itertools import product, starmap
from typing import NamedTuple

from .. import command

STAGES = ("chain", "concat", "linear_merge", "linear", "linear_scatter")
BATCHES, DTYPES = [1, 8, 2, 32, 4, 64, 16], ("bfloat16", "float16", "float32")  # in this order
TRAINING = "forward+backward"


class Step(NamedTuple):
    """One set of operands, and what of it is measured."""

    slow: bool
    dtype: str
    batch: int
    stage: str
    run: str

    @property
    def trains(self) -> bool:
        return self.run == TRAINING

    def __str__(self) -> str:
        return f"{self.stage} {self.run}, batch {self.batch}, {self.dtype}" + ", torch.compile" * self.slow


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="Time the projector on a GPU.")
    parser.add_argument("--batch", type=command.positive(int), nargs="+", default=BATCHES, metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:2])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--json", type=command.writable_file, metavar="FILE", help="default: .work/results/<device>/")
    parser.add_argument("--budget", type=command.positive(float), default=900.0, metavar="SECONDS")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--small", action="store_true", help="a toy, on any device; times mean nothing")
    return parser.parse_args(argv)


def steps(args: argparse.Namespace) -> list[Step]:
    """Forward + backward is of the chain alone: that is what trains."""
    slow = (False,) if args.no_compile else (False, True)
    every = starmap(Step, product(slow, args.dtype, args.batch, args.stage, ("forward", TRAINING)))
    return [step for step in every if step.stage == "chain" or not step.trains]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if not torch.cuda.is_available() and not args.small:
        raise command.BadInput("no GPU here (--small tries the program)")
    from .. import results
    from .run import Run
    from .table import report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.json or results.results_folder(device) / "kernels.json"
    run = Run(steps(args), device, path, small=args.small, seconds=args.budget)
    run.measure()
    print(f"\n{report(run.result)}\n\n{path}")
    # A rival that does not run here is a row that says so; one of our own paths that fails is a failure.
    return 1 if any(row["failed"] and row["provider"].startswith("stf") for row in run.result["rows"]) else 0


if __name__ == "__main__":
    command.run(main)
