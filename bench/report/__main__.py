"""Result files -> one page and its charts. Exit codes: 0, or 2 for a file that is not a result or is cut short."""

import argparse
from pathlib import Path

from .. import command
from ..results import ResultError

NAME = "bench.report"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="A page from result files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="prefill.json, kernels.json, tests.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: beside the first FILE")
    args = parser.parse_args(argv)
    from .page import write_report

    try:
        path, note = write_report(args.files, args.out or args.files[0].parent)
        print("\n".join(filter(None, (note, str(path)))))
    except ResultError as error:
        return command.bad_input(NAME, str(error))
    except (FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError) as error:
        return command.bad_input(NAME, f"--out: {error}")
    return 0


if __name__ == "__main__":
    command.run(main)
