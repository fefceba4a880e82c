"""`make test` on every Python that the README names, with the oldest and the newest versions of what it names.

    make matrix                       every row below
    make matrix ARGS="3.10 3.13"      those rows

Each row is an environment of its own, .venv-matrix-<Python>. A Python that is neither on PATH nor in pyenv is "not
available here", which is no pass: the exit status is 0 only if every row that was asked for ran and passed.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import time

ROWS = {  # Python: (what it is, a file that takes the place of lines of constraints.txt)
    "3.10": ("oldest", ".ci/oldest.txt"),
    "3.11": ("pinned", ""),
    "3.12": ("pinned", ""),
    "3.13": ("newest", ".ci/newest.txt"),
}
VERSIONS = """
from importlib.metadata import version
print(*(version(name).partition("+")[0] for name in ("torch", "triton", "transformers")), sep=" | ")
"""


def python(version):
    """The first that runs: pyenv's shims are on PATH also where they lead nowhere."""
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    found = [shutil.which(f"python{version}"), *glob.glob(f"{pyenv}/versions/{version}.*/bin/python{version}")]
    for path in filter(None, found):
        if subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return path
    return None


def run(version):
    """(cells of the row, whether it passed)"""
    what, pins = ROWS[version]
    path = python(version)
    if path is None:
        return [version, what, "", "", "", "not available here"], False
    folder, began = f".venv-matrix-{version}", time.monotonic()
    command = ["make", "test", f"VENV={folder}", f"PYTHON={path}", f"PINS={pins}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts = {}
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.match(r"=+ .*\bin [\d.]+s", line):  # the last line of each of the three runs
            for number, outcome in re.findall(r"(\d+) (passed|failed|errors?|skipped)", line):
                counts[outcome] = counts.get(outcome, 0) + int(number)
    passed = process.wait() == 0
    outcome = ", ".join(f"{number:,} {outcome}" for outcome, number in counts.items()) or "not installed"
    shown = subprocess.run([f"{folder}/bin/python", "-c", VERSIONS], capture_output=True, text=True).stdout.strip()
    minutes = (time.monotonic() - began) / 60
    versions = shown.split(" | ") if shown else [""] * 3
    return [version, what, *versions, f"{outcome}, {minutes:.0f} min" if passed else f"FAILED: {outcome}"], passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", default=list(ROWS), metavar="PYTHON", help=f"of {', '.join(ROWS)}")
    asked = parser.parse_args().pythons
    if unknown := set(asked) - set(ROWS):
        parser.error(f"PYTHON: expected some of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    results = [run(version) for version in asked]
    commit = "unknown"
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"\n| Python | versions | torch | triton | transformers | `make test`, commit {commit} |")
    print("|---|---|---|---|---|---|")
    for cells, _ in results:
        print(f"| {' | '.join(cells)} |")
    return 0 if all(passed for _, passed in results) else 1


if __name__ == "__main__":
    sys.exit(main())
