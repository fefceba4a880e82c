"""Which tests run a line, and what each takes: every test file once, under coverage, in a process of its own.

What a fixture of several tests runs is covered by each of them, what a test's own processes run by that test; what runs
when a module is imported by the tests of the lines of that file that name it, or of the whole file. A worker has a
copy of the checkout, and in memory what takes long to import: a process of its own is a fork of it, and imports the
copy. Every time is the processor's.
"""

import ast
import contextlib
import difflib
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest
from mutants import ROOT

WORK = ROOT / ".work" / "mutation"
TESTED = r"tests/((aot|configs|convert|interpreter|launch|operators|training)/test_\w+\.py|"
TESTED += r"llava/test_(llava_warm_start|tiles_model)\.py|project/test_commands\.py)"
SLOW = ("/test_attack.py", "/test_compile.py", "/test_long_runs.py")
PRELOADED = (
    "torch",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
    "hypothesis",
)
FORK = multiprocessing.get_context("fork")
COVERAGE = "[run]\nparallel = true\npatch = _exit\nsource = {0}/stf_kernels\n    {0}/llava_integration\n"
COVERAGE += "data_file = ${{MUTATION_DATA}}/lines\ncontext = ${{PYTEST_CURRENT_TEST-}}\n"
Test = tuple[bool, str]  # whether it is of the interpreter, its name


def own_tree() -> Path:
    return WORK / f"tree-{os.environ['MUTATION_WORKER']}"


def start_worker(numbers: Any) -> None:
    """A tree of its own, and in memory what takes long to import; nothing of the checkout, so that mutants are."""
    os.environ |= {"MUTATION_WORKER": str(numbers.get()), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # importing them takes longer than most tests
    shutil.rmtree(own_tree(), ignore_errors=True)
    for name in listed_files():
        (own_tree() / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, own_tree() / name)
    (own_tree() / ".coveragerc").write_text(COVERAGE.format(own_tree()))
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage twice


def listed_files() -> list[str]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in found.split("\0") if (ROOT / name).is_file()]


def forked(seconds: float, interpreted: bool, work: Callable[..., Any], *arguments: Any) -> Any:
    """What work(*arguments) answers in a process of its own, with this worker's tree as its checkout."""
    receiving, sending = FORK.Pipe(duplex=False)
    child, answer = FORK.Process(target=in_child, args=(sending, int(seconds), interpreted, work, *arguments)), None
    child.start()
    sending.close()
    try:
        with contextlib.suppress(EOFError):
            answer = receiving.recv() if receiving.poll(600 + 30 * seconds) else None  # others are at work, too
    finally:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it has started
        child.join()
    slow = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    return answer or {"ended": "time-out" if slow else f"exit status {child.exitcode}"}


def in_child(sending: Any, seconds: int, interpreted: bool, work: Callable[..., Any], *arguments: Any) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (48 << 30, 48 << 30))  # a mistake about a size must not take the machine
    log = os.open(own_tree() / ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(own_tree())
    sys.path[:0] = [str(own_tree())]
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
        for name in [name for name in sys.modules if re.match(r"triton(?!\._C)\b", name)]:
            del sys.modules[name]  # transformers has imported it, to compile
    sending.send(work(*arguments))


def run_tests(nodes: list[str], *options: Any) -> None:
    files = sorted({node.partition("::")[0] for node in nodes})
    plugins = [option for option in options if not isinstance(option, str)]
    flags = [option for option in options if isinstance(option, str)]
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", *flags, *files], plugins=plugins)


class Mapper:
    """Under coverage: its context is the test that runs, or the fixture that several tests share."""

    def __init__(self, measured: Any) -> None:
        self.measured, self.tests, self.contexts = measured, {}, [""]

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        self.contexts.append(name)
        self.measured.switch_context(name)
        yield
        self.contexts.pop()
        self.measured.switch_context(self.contexts[-1])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        shared = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values() if found[-1].scope != "function"]
        test = self.tests[item.nodeid] = {"passed": True, "fixtures": [f"{f.baseid} {f.argname}" for f in shared]}
        began = sum(os.times()[:4])
        with self.context(item.nodeid):
            result = yield
        test["seconds"] = sum(os.times()[:4]) - began
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        with self.context(f"{fixturedef.baseid} {fixturedef.argname}"):
            return (yield)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid]["passed"] &= report.passed


def measure(file: str) -> dict[str, Any]:
    """{"tests": {name: passed, fixtures, seconds}, "lines": {"path:line": contexts}} of one file of tests."""
    import coverage

    lines = defaultdict(set)
    with tempfile.TemporaryDirectory() as data:
        os.environ |= {"MUTATION_DATA": data, "COVERAGE_PROCESS_START": str(own_tree() / ".coveragerc")}
        measured = coverage.Coverage(config_file=str(own_tree() / ".coveragerc"))
        mapper = Mapper(measured)
        with measured.collect():
            run_tests([file], mapper)
        measured.save()
        for part in Path(data).iterdir():
            found = coverage.CoverageData(str(part))
            found.read()
            for name in found.measured_files():
                for line, contexts in found.contexts_by_lineno(name).items():
                    plain = {re.sub(r" \((setup|call|teardown)\)$", "", context) for context in contexts}
                    lines[f"{os.path.relpath(name, own_tree())}:{line}"] |= plain
    return {"tests": mapper.tests, "lines": {place: sorted(contexts) for place, contexts in lines.items()}}


def digest_of(path: str) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:16]


def map_file(file: str) -> Path:
    kept = WORK / "map" / f"{file.replace('/', '-')}-{digest_of(file)}.json"
    if not kept.exists():
        found = forked(3600, "/interpreter/" in file, measure, file)
        covered = {place.partition(":")[0] for place in found.get("lines", ())}
        found["sources"] = {path: digest_of(path) for path in covered}
        for path, digest in found["sources"].items():
            shutil.copyfile(ROOT / path, WORK / "map" / digest)
        kept.with_suffix(".part").write_text(json.dumps(found))
        kept.with_suffix(".part").rename(kept)
    return kept


def lines_in_functions(text: str) -> set[int]:
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {line for node in functions for line in range(node.body[0].lineno, node.end_lineno + 1)}


@functools.cache
def moved(path: str, digest: str) -> dict[int, list[int]]:
    """Where the lines of a source are that has changed since a file of tests was mapped; new ones are their place's."""
    old, new = ((file.read_text(encoding="utf-8").splitlines()) for file in (WORK / "map" / digest, ROOT / path))
    found = defaultdict(list)
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for at in range(i, i_end) if kind == "equal" else range(max(i - 1, 0), i_end + 1):
            found[at + 1] += [at - i + j + 1] if kind == "equal" else range(j + 1, j_end + 1)
    return found


class Map:
    """Which tests cover a mutant. A file of tests is mapped again when it has changed, not when what it tests has."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        (WORK / "map").mkdir(exist_ok=True)
        names = [name for name in listed_files() if re.fullmatch(TESTED, name) and not name.endswith(SLOW)]
        jobs = [pool.submit(map_file, name) for name in names]
        self.seconds, self.lines = {}, defaultdict(set)
        for number, done in enumerate(as_completed(jobs), 1):
            print(f"map {number}/{len(jobs)} {done.result().stem}", flush=True)
            part, of_context = json.loads(done.result().read_text()), defaultdict(set)
            if "ended" in part:
                print(f"    not mapped: {part['ended']}")
                continue
            for node, test in part["tests"].items():
                if test["passed"]:
                    self.seconds[key := ("/interpreter/" in node, node)] = test["seconds"]
                    for context in (node, *test["fixtures"]):
                        of_context[context].add(key)
            for place, contexts in part["lines"].items():
                path, _, line = place.partition(":")
                if not (ROOT / path).exists():
                    continue
                for now in moved(path, part["sources"][path])[int(line)]:
                    self.lines[f"{path}:{now}"] |= set().union(*(of_context[context] for context in contexts))

    def covering(self, mutant: dict[str, Any]) -> list[Test]:
        """Fastest first, and of every file as much: one that asks other things than the rest is not the last."""
        path, own = mutant["path"], range(mutant["line"], mutant["end"] + 1)
        statement = f"{path}:{mutant['statement']}"
        tests = set().union(*(self.lines[f"{path}:{line}"] for line in own)) or self.lines[statement]
        text = (ROOT / path).read_text(encoding="utf-8")
        called = lines_in_functions(text)
        if mutant["line"] not in called:  # it runs at import, in whichever test is the first that does
            name = re.search(r"(?:(?:def|class) |@)?([\w.]+)", text.splitlines()[mutant["statement"] - 1])[1]
            said = {n for n, line in enumerate(text.splitlines(), 1) if re.search(rf"\b{re.escape(name)}\b", line)}
            naming = set().union(*(self.lines[f"{path}:{line}"] for line in said & called))
            tests = naming or set().union(*(self.lines[f"{path}:{line}"] for line in called))
        of_file, until = Counter(), {}
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            of_file[test[1].partition("::")[0]] += self.seconds[test]
            until[test] = of_file[test[1].partition("::")[0]]
        return sorted(until, key=until.__getitem__)
