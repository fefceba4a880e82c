"""Result files -> one page and its charts; or the difference between two runs, and whether it is more than noise.

    python -m bench.report FILE... [--out DIR]     report.html and PNG charts, beside the first FILE unless --out says
    python -m bench.report --compare A B           rows of two runs on one device: B over A, beyond their spread or not

Exit codes: 0, or 2 for a file that is not a result, is cut short, or comes from another device.
"""

import argparse
import sys
from pathlib import Path

from .. import command
from ..results import ResultError

NAME = "bench.report"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="A page from result files.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="prefill.json, kernels.json, tests.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: beside the first FILE")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two runs of the same kind")
    args = parser.parse_args(argv)
    if not args.files and not args.compare:
        parser.error("give result FILEs or --compare A B")
    from .compare import compare
    from .page import write_report

    said, note = [], None
    try:
        if args.compare:
            said.append(compare(*args.compare))
        if args.files:
            path, note = write_report(args.files, args.out or args.files[0].parent)
            said.append(str(path))
    except ResultError as error:
        return command.bad_input(NAME, str(error))
    except OSError as error:
        return command.bad_input(NAME, f"--out: {error}")
    print("\n".join(said))
    if note:
        print(note, file=sys.stderr)
    return 0


if __name__ == "__main__":
    command.run(main)
