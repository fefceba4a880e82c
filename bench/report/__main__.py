"""Result files -> one page and its charts. Exit codes: 0, or 2 for a file that is not a result or is cut short."""

import argparse
from pathlib import Path

from .. import command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="A page from result files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="prefill.json, kernels.json, tests.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: beside the first FILE")
    args = parser.parse_args(argv)
    from .page import write_report

    try:
        print(*filter(None, write_report(args.files, args.out or args.files[0].parent)), sep="\n")
    except (FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError) as error:
        raise command.BadInput(f"--out: {error}") from None
    return 0


if __name__ == "__main__":
    command.run(main)
