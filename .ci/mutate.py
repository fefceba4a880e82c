"""Seeded mutants of stf_kernels and the converters, each against the tests that cover its line: make mutate

    copy   the checkout into .work/mutation/tree-N, one a worker; a mutant is written there, never here
    map    covering.py: which tests run a line
    draw   mutants.py; what runs.jsonl knows is not run again, and a file that has changed has other mutants
    run    those tests, fastest first, up to the first failure; in the interpreter those that run kernels

A failure is a kill only if the same test passes right after, without the mutant, which a worker asks once of a test.
Where the tests of a line take longer than --most seconds the fastest of them are run, and what only the others would
see counts as survived.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from covering import FORK, WORK, Map, forked, own_tree, run_tests, start_worker
from mutants import ROOT, STRATA, draw, mutated

FILES = 3  # of tests that a mutant meets first
FINE: dict[str, Any] = {"failed": None}
PASSED: set[str] = set()  # without a mutant, in this worker
OUTCOMES = ("killed", "survived", "not covered", "time-out", "import error")


class Runner:
    """Some of the tests, in an order; which of them failed."""

    def __init__(self, nodes: list[str]) -> None:
        self.order, self.failed, self.ran = {node: place for place, node in enumerate(nodes)}, None, 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        self.failed = self.failed or (report.nodeid if report.failed else None)


def attempt(module: str, nodes: list[str]) -> dict[str, Any]:
    try:
        importlib.import_module(module)
    except BaseException as error:
        return {"ended": "import error", "test": repr(error)[:200]}
    runner = Runner(nodes)
    run_tests(nodes, runner, "-x")
    return {"failed": runner.failed} if runner.ran or runner.failed else {"ended": "import error", "test": "collection"}


def run_mutant(mutant: dict[str, Any], tests: list[tuple[bool, str, float]]) -> dict[str, Any]:
    """The mutant with its outcome."""
    file, module = own_tree() / mutant["path"], mutant["path"][:-3].replace("/", ".").removesuffix(".__init__")
    original = file.read_bytes()
    for interpreted in (False, True):
        left = {node: seconds for of, node, seconds in tests if of == interpreted}
        files = dict.fromkeys(node.partition("::")[0] for node in left)
        few = list(files)[:FILES]  # where they do, no other is imported
        while left:
            nodes = [node for node in left if node.partition("::")[0] in few] or list(left)
            limit = 60 + 5 * sum(left.values())
            file.write_bytes(mutated(original, mutant))
            try:
                found = forked(limit, interpreted, attempt, module, nodes)
            finally:
                file.write_bytes(original)
            if "ended" in found:
                crashed = found["ended"].startswith("exit status -")
                return mutant | {"outcome": "killed" if crashed else found["ended"], "test": found.get("test")}
            if found["failed"] is None:
                left = {node: seconds for node, seconds in left.items() if node not in nodes}
            elif found["failed"] in PASSED or forked(limit, interpreted, attempt, module, [found["failed"]]) == FINE:
                PASSED.add(found["failed"])
                return mutant | {"outcome": "killed", "test": found["failed"]}
            else:
                left.pop(found["failed"])
    return mutant | {"outcome": "survived" if tests else "not covered", "test": None}


def report(drawn: list[dict[str, Any]], known: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """What the result file says. score: kills among the mutants that were drawn, without time-outs, import errors."""
    strata = {}
    for stratum in [*STRATA, "all"]:
        own = [mutant for mutant in drawn if stratum in (mutant["stratum"], "all")]
        counts = Counter(known[mutant["id"]]["outcome"] for mutant in own if mutant["id"] in known)
        judged = sum(counts[name] for name in OUTCOMES[:3])
        strata[stratum] = {"drawn": len(own)} | {name: counts[name] for name in OUTCOMES}
        strata[stratum]["score"] = round(counts["killed"] / judged, 4) if judged else None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    versions = {name: metadata.version(name) for name in ("torch", "triton", "transformers")}
    whole = all(mutant["id"] in known for mutant in drawn)
    about = {"kind": "mutation", "complete": whole, "commit": git.stdout.strip(), "python": platform.python_version()}
    lived = [known[m["id"]] for m in drawn if m["id"] in known and known[m["id"]]["outcome"] != "killed"]
    place = ("stratum", "path", "line", "kind", "old", "new", "outcome", "test")
    return about | versions | {"seed": seed, "strata": strata, "not_killed": [{n: m[n] for n in place} for m in lived]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--mutants", type=int, default=400, help="of all strata together, default 400")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--most", type=float, default=60.0, help="seconds of tests for a mutant, default 60")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: one a core")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=OUTCOMES, help="run those with this outcome once more"
    )
    parser.add_argument("--json", type=Path, help="the result file; default: print the table only")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    runs, numbers = WORK / "runs.jsonl", FORK.Queue()
    known = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []
    known = {run["id"]: run for run in known}
    counts = {stratum: round(count * options.mutants / 400) for stratum, (count, _) in STRATA.items()}
    drawn = [mutant for stratum, count in counts.items() for mutant in draw(stratum, count, options.seed)]
    todo = [m for m in drawn if m["id"] not in known or known[m["id"]]["outcome"] in options.again]
    for number in range(options.workers):
        numbers.put(number)
    print(f"{len(drawn)} mutants, {len(todo)} of them to be run", flush=True)
    with ProcessPoolExecutor(options.workers, FORK, start_worker, (numbers,)) as pool, runs.open("a") as file:
        if todo:
            found, jobs = Map(pool), []
            for mutant in sorted(todo, key=lambda mutant: mutant["id"]):
                tests, taken = [], 0.0
                for test in found.covering(mutant):
                    taken += found.seconds[test]
                    if not tests or taken < options.most:
                        tests.append((*test, found.seconds[test]))
                jobs.append(pool.submit(run_mutant, mutant, tests))
            for number, done in enumerate(as_completed(jobs), 1):
                run = known[done.result()["id"]] = done.result()
                file.write(json.dumps(run) + "\n")
                file.flush()
                change = f"{run['path']}:{run['line']} {run['old']!r} -> {run['new']!r}"
                print(f"{number}/{len(jobs)} {run['outcome']}: {change[:160]} {run['test'] or ''}", flush=True)
    result = report(drawn, known, options.seed)
    for stratum, row in result["strata"].items():
        print(f"{stratum:12}", *(f"{name} {value}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
