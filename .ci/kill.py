"""Kill sweeps: what a SIGKILL at a random moment leaves of a conversion, a selection, a training, a benchmark.

    python .ci/kill.py [JOB ...] [--kills 50] [--seed 1]                                            make kill-sweep

A job runs in a fork of this process, which has imported everything, and is killed: by turns at a random moment of its
time, and at a random one of what it does to files (open, mkdir, rename, remove), where half-written ones are to be had.
After every kill `check` looks at what is left and says how far it had come; after every fifth the job runs to its end,
which has to be that of a run that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STF_KERNELS_BACKEND": "torch"}

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.utils import logging  # noqa: E402

import bench.prefill.__main__ as prefill  # noqa: E402
from bench import results  # noqa: E402
from bench.quality import study  # noqa: E402
from llava_integration import train  # noqa: E402
from llava_integration.convert import convert_official  # noqa: E402
from llava_integration.convert import folder as converter  # noqa: E402
from stf_kernels.configs import tables  # noqa: E402
from stf_kernels.ops import launch  # noqa: E402
from stf_kernels.ops.segments import Stage  # noqa: E402
from tests.configs import conftest as simulated  # noqa: E402
from tests.convert import checkpoints  # noqa: E402
from tests.learn import conftest as learning  # noqa: E402
from tests.llava import build  # noqa: E402

FILES = (
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "tempfile.mkstemp",
)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Job:
    """run: in a process of its own. check: how far it is; AssertionError where something is lost. fresh: begin anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"

    def run(self) -> None:
        raise NotImplementedError

    def check(self) -> str:
        raise NotImplementedError

    def fresh(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)


class Convert(Job):
    """SRC is as it was; DST is not there, or all of it."""

    expected: dict[str, bytes] | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.src = checkpoints.make_official(folder)
        self.before = snapshot(self.src)

    def run(self) -> None:
        converter.MAX_SHARD_BYTES = 100_000
        if not self.out.exists():  # killed after it had finished: DST is refused, and stays as it is
            convert_official(self.src, self.out, auto_map=True)

    def check(self) -> str:
        assert snapshot(self.src) == self.before
        if not self.out.exists():
            return "nothing"
        self.expected = self.expected or snapshot(self.out)  # of the first run, which nobody kills
        assert snapshot(self.out) == self.expected
        return "whole"

    def fresh(self) -> None:
        super().fresh()
        for left in self.folder.glob(".out.*.partial"):
            shutil.rmtree(left)


class Selection(Job):
    """Every selection that a call has returned from is known to the next process, which makes only those that are left;
    a GPU is simulated, and its clock (tests/configs)."""

    PROBLEMS = range(8, 200, 8)

    def run(self) -> None:
        os.environ.pop("STF_KERNELS_BACKEND")
        patch, before = pytest.MonkeyPatch(), len(self.known())
        pretend = next(simulated.pretend._get_wrapped_function()(patch))
        gpu = simulated.gpu._get_wrapped_function()(pretend, patch, self.out)
        x, weight = torch.randn(2, 72, 128).bfloat16(), torch.randn(256, 128).bfloat16()
        for n in self.PROBLEMS:
            launch.run_stage([x], weight[:n], None, Stage("gelu"))
            with open(self.folder / "returned", "a") as file:
                file.write(f"{n}\n")
        assert gpu.selections == len(self.PROBLEMS) - before, (gpu.selections, before)

    def known(self) -> set[int]:
        os.environ["STF_KERNELS_CACHE"] = str(self.out)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a file that is not whole
            return {n for _, _, n, *_ in tables.cache_of.__wrapped__("test-gpu", "sm_90").known}

    def check(self) -> str:
        known, returned = self.known(), self.folder / "returned"
        said = set(map(int, returned.read_text().split())) if returned.exists() else set()
        assert said <= known, said - known
        return "whole" if len(known) == len(self.PROBLEMS) else "part" if known else "nothing"

    def fresh(self) -> None:
        super().fresh()
        (self.folder / "returned").unlink(missing_ok=True)


class Training(Job):
    """The newest whole checkpoint is no older than before, and can be read; the end is that of an uninterrupted run."""

    expected: dict[str, torch.Tensor] | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        build.stock(torch.float32).save_pretrained(folder / "model")
        learning.processor._get_wrapped_function()().save_pretrained(folder / "model")
        self.data, self.reached = learning.write_data(folder / "data", list(map(learning.record, range(8)))), 0

    def run(self) -> None:
        paths = ["--model", self.folder / "model", "--data", self.data, "--output", self.out / "run"]
        paths += ["--cache-features", self.out / "features"]
        options = ["--use_cpu", "--disable_tqdm", "True", "--per_device_train_batch_size", "2", "--batch", "4"]
        options += ["--max_steps", "6", "--save_steps", "1", "--learning_rate", "1e-2", "--resume"]
        self.out.mkdir(exist_ok=True)
        assert train.main(["pretrain", *map(str, paths), *options]) == 0

    def check(self) -> str:
        newest = train.last_checkpoint(self.out / "run")
        step = 0 if newest is None else int(newest.name.partition("-")[2])
        assert step >= self.reached, f"step {step} after {self.reached}"
        self.reached = step
        if newest:
            load_file(newest / "model.safetensors")
            torch.load(newest / "optimizer.pt", weights_only=True)
        try:
            found = load_file(self.out / "run" / "model.safetensors")
        except Exception:  # not there, or not whole, which its header tells
            return "part" if newest else "nothing"
        self.expected = self.expected or found
        assert found.keys() == self.expected.keys()
        assert all(torch.equal(found[name], value) for name, value in self.expected.items())
        return "whole" if (self.out / "run" / "training_args.bin").exists() else "part"

    def fresh(self) -> None:
        super().fresh()
        self.reached = 0


class Benchmark(Job):
    """The file is not there or valid, of a run that is under way or whole; that of an earlier whole run is not lost."""

    def run(self) -> None:
        self.out.mkdir(exist_ok=True)
        options = ["--preset", "tiny", "--device", "cpu", "--batch", "1", "--rounds", "2"]
        assert prefill.main([*options, "--json", str(self.out / "prefill.json")]) == 0

    def check(self) -> str:
        file = self.out / "prefill.json"
        found = [results.read(path) for path in (file, file.with_suffix(".previous.json")) if path.exists()]
        whole = any(result["complete"] for result in found)
        assert whole or not self.had_whole, "the result of the run before is gone"
        self.had_whole = whole
        return "whole" if found and found[0]["complete"] else "part" if found else "nothing"

    had_whole = False

    def fresh(self) -> None:
        pass


class Study(Job):
    """What bench.quality has finished stays: parts are folders, rows are files."""

    BUDGET = study.Budget(2, 2, 2, 1, 1, 4, 12, 8, 20, 20)  # so many that every kind of question is there
    finished: frozenset[str] = frozenset()
    expected: dict[str, Any] | None = None

    def run(self) -> None:
        made = study.Study(self.out, self.BUDGET)
        found = {row.model + row.start: made.row(row, 0)["accuracy"] for row in study.ROWS[2:4]}
        tables.write_json(self.out / "found.json", found)

    def check(self) -> str:
        parts = {str(p.relative_to(self.out)) for p in self.out.glob("[!.]*") if p.is_dir() and p.name != "rows"}
        rows = {str(path.relative_to(self.out)) for path in self.out.glob("rows/*.json")}
        assert all(json.loads((self.out / row).read_text())["accuracy"] for row in rows)
        assert self.finished <= parts | rows, self.finished - parts - rows
        self.finished = frozenset(parts | rows)
        if not (self.out / "found.json").exists():
            return "part" if self.finished else "nothing"
        found = json.loads((self.out / "found.json").read_text())
        self.expected = self.expected or found
        assert found == self.expected
        return "whole"

    def fresh(self) -> None:
        super().fresh()
        self.finished = frozenset()


JOBS = {"convert": Convert, "selection": Selection, "training": Training, "benchmark": Benchmark, "study": Study}


def events(at: int | None) -> Callable[[], int]:
    """Kills this process at its so many-th event -> how many there have been."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in FILES:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def child(job: Job, after: float | None = None, at: int | None = None) -> int | None:
    """Run a job in a process of its own, killed or not -> None where it was killed, else the number of its events."""
    log, count = job.folder / "log", job.folder / "events"
    pid = os.fork()
    if not pid:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            counted = events(at)
            job.run()
            count.write_text(str(counted()))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + (600 if after is None else after)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status == -signal.SIGKILL:
        assert after is not None or at is not None, f"{log}: it did not end"
        return None
    assert status == 0, log.read_text()[-3000:]
    return int(count.read_text())


def sweep(job: Job, kills: int, draw: random.Random) -> Counter:
    """-> how many kills found the job how far; `ended`: runs that came to their end."""
    counts, began = Counter(), time.monotonic()
    of_files = child(job)
    seconds = time.monotonic() - began
    assert job.check() == "whole"
    job.fresh()
    done = 0
    while done < kills:
        by_clock = {"after": draw.random() * seconds}
        events = child(job, **(by_clock if done % 2 else {"at": draw.randint(1, of_files)}))
        state = job.check()
        if events is None:
            done += 1
            counts[state] += 1
        if events is not None or done % 5 == 0:
            assert events is not None or child(job) is not None
            assert job.check() == "whole"
            counts["ended"] += 1
            job.fresh()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"default: {' '.join(JOBS)}")
    parser.add_argument("--kills", type=int, default=50, help="of each job, default 50")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for name in options.jobs or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            found = sweep(JOBS[name](Path(folder)), options.kills, random.Random(options.seed))
            cells = [found[state] for state in ("nothing", "part", "whole", "ended")]
            print(
                f"| {name} | {options.kills} | {' | '.join(map(str, cells))} |   {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
