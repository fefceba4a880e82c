"""The offline search: which configuration is fastest for a problem on the GPU at hand, or whether cuBLAS is.

Candidates are pruned before anything runs:

    shared memory    stages * block_k * (block_m + block_n) * itemsize  within the device's limit
    registers        the fp32 accumulator takes at most 128 registers a thread
    cost             waves of tiles over the multiprocessors times the work of a tile, padding included;
                     what is over twice the best is not tried

The rest is compiled first, all cores at once (ops/compile_ahead.py): compiling takes ten times as long as measuring.
A measurement is a median over repetitions, each on a cold cache and replayed from a CUDA graph, so that the host's
launch time counts for nobody (timing.py). Every one goes to a journal at once, so that an interrupted search goes on
where it stopped.
"""

import contextlib
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import launch, torch_path, weight_grad
from ..ops.compile_ahead import compiling_ahead
from ..problems import Problem
from .config import GemmConfig
from .heuristic import has_descriptor_forms
from .lookup import TABLE_VERSION, parse_table
from .timing import Flush, capture, replay

_ACCUMULATOR_REGISTERS = 128
_NOT_WORTH_TRYING = 2.0  # times the best estimate
_WARM_UP, _REPEATS = 3, 30
CUBLAS_MARGIN = 0.98  # cuBLAS must be this much faster than the best kernel to be named


def candidates(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    *,
    shared_limit: int,
    multiprocessors: int,
    splits: Sequence[int] = (1, 2, 4, 8),
    forms: Sequence[str] = ("pointers",),
) -> list[GemmConfig]:
    """Configurations worth measuring for y [m, n] = A [m, k] @ W^T, the most promising first.

    Tiles come in the order of their cost, first each with one pipeline, then each with its next, so that a search cut
    short has tried every promising tile. Where two forms cost the same, descriptors come first: they spare the
    address arithmetic, which the estimate does not see.
    """
    tiles = [
        (cost(tile.rows, tile.bn, tile.splits, m, n, k, multiprocessors), tile.form == "pointers", tile)
        for form in forms
        for tile in _tiles(form, splits)
    ]
    best = min(tiles)[0]
    promising = [tile for estimate, _, tile in sorted(tiles) if estimate <= _NOT_WORTH_TRYING * best]
    pipelines = [list(_pipelines(tile, itemsize, shared_limit)) for tile in promising]
    return [config for turn in itertools.zip_longest(*pipelines) for config in turn if config is not None]


class Tile(NamedTuple):
    """bm + tail rows by bn columns of y, K shared out among `splits` programs."""

    form: str
    bm: int
    tail: int
    bn: int
    splits: int

    @property
    def rows(self) -> int:
        return self.bm + self.tail


def _tiles(form: str, splits: Sequence[int]) -> Iterator[Tile]:
    rows, widths, shares = {
        "pointers": (((16, 0), (32, 0), (64, 0), (128, 0), (256, 0)), (32, 64, 128, 256), splits),
        # 256 rows spill where a GELU follows
        "descriptors": (((64, 0), (128, 0), (192, 0)), (64, 128, 256), (1,)),
        "swapped": (((64, 16), (128, 16), (128, 32)), (64, 128, 256), splits),
    }[form]
    return (Tile(form, bm, tail, bn, share) for (bm, tail), bn, share in itertools.product(rows, widths, shares))


def _pipelines(tile: Tile, itemsize: int, shared_limit: int) -> Iterator[GemmConfig]:
    """The ways to run one tile: warps that hold its accumulator, and the deepest pipelines that fit."""
    for bk in (64, 32, 128) if itemsize == 2 else (32, 16):
        for warps in (8, 4):
            if not 512 * warps // 4 <= tile.rows * tile.bn <= _ACCUMULATOR_REGISTERS * warps * 32:
                continue
            fitting = [
                config
                for stages in (5, 4, 3, 2)
                if (
                    config := GemmConfig(tile.bm, tile.bn, bk, 8, warps, stages, tile.splits, tile.form, tile.tail)
                ).shared_bytes(itemsize)
                <= shared_limit
            ]
            yield from fitting[:2]


def forms_for(problem: Problem, arch: str, itemsize: int) -> tuple[str, ...]:
    """The kernels that can run a problem on an architecture."""
    if not has_descriptor_forms(arch, itemsize) or problem.stage.gather > 1 or problem.wgrad:
        return ("pointers",)
    return ("descriptors", "pointers") if problem.num_blocks > 1 else ("descriptors", "swapped", "pointers")


def cost(bm: int, bn: int, splits: int, m: int, n: int, k: int, multiprocessors: int) -> float:
    """Relative time of a tile: waves of programs, times what one does.

    A program multiplies and adds bm * bn * k / splits times and reads (bm + bn) * k / splits elements, each worth 64 of
    those; a split one also writes its part, and the last reads them all.
    """
    programs = math.ceil(m / bm) * math.ceil(n / bn) * splits
    reduction = 64 * 2 * splits * bm * bn if splits > 1 else 0
    return math.ceil(programs / multiprocessors) * ((bm * bn + 64 * (bm + bn)) * k / splits + reduction)


@dataclass(frozen=True)
class Key:
    """What an entry of the table is for."""

    problem: str
    dtype: str
    m: int


class Journal:
    """Measurements as they come, one JSON line each: {"problem", "dtype", "m", "config" or null, "us" or null}."""

    def __init__(self, path: Path, header: dict) -> None:
        """header: device and versions; a journal of another header is not mixed with this one."""
        self._path, self._seen = path, {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        if lines and _json(lines[0]) != header:
            raise ValueError(
                f"--journal: {path} is of {lines[0]:.300}, this search is of {json.dumps(header)}; name another"
            )
        for row in map(_json, lines[1:]):
            try:
                index = self._index(Key(row["problem"], row["dtype"], row["m"]), row["config"])
                self._seen[index] = row["us"]
            except (TypeError, KeyError, AttributeError):
                continue  # the line that an interruption cut short, or what else is no measurement
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    @staticmethod
    def _index(key: Key, config: dict | None) -> tuple:
        return key, None if config is None else tuple(sorted(config.items()))

    def knows(self, key: Key, config: GemmConfig | None) -> bool:
        return self._index(key, None if config is None else config.to_dict()) in self._seen

    def time(self, key: Key, config: GemmConfig | None, measure: Callable[[], float | None]) -> float | None:
        """Microseconds as noted, or measured now and noted; None is a configuration that does not run."""
        values = None if config is None else config.to_dict()
        index = self._index(key, values)
        if index not in self._seen:
            us = measure()
            row = {"problem": key.problem, "dtype": key.dtype, "m": key.m, "config": values, "us": us}
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(row))
            self._seen[index] = us
        return self._seen[index]


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def entry_for(
    problem: Problem, key: Key, configs: list[GemmConfig], measure: Callable[[GemmConfig | None], float | None],
    journal: Journal,
) -> dict:  # fmt: skip
    """Measure cuBLAS and every configuration -> the table's entry, with the measurement that justifies it."""
    rival = journal.time(key, None, lambda: measure(None))
    times = {config: journal.time(key, config, lambda c=config: measure(c)) for config in configs}
    runs = {config: us for config, us in times.items() if us is not None}
    if not runs:
        raise RuntimeError(f"{key}: none of {len(configs)} configurations runs on this device")
    best = min(runs, key=runs.__getitem__)
    kernel_wins = runs[best] * CUBLAS_MARGIN <= rival
    return {
        "stage": problem.kind,
        "dtype": key.dtype,
        "n": problem.n,
        "k": problem.k,
        "m_max": key.m,
        "provider": "triton" if kernel_wins else "cublas",
        "config": best.to_dict() if kernel_wins else None,
        "us": runs[best] if kernel_wins else rival,
        "rival": "cublas" if kernel_wins else "triton",
        "rival_us": rival if kernel_wins else runs[best],
    }


def entries_of(path: Path, header: dict) -> list[dict]:
    """The entries of the table that is there, if it was measured by the same versions; another one is begun anew."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        parse_table(text, header["arch"])
    except (ValueError, TypeError, KeyError) as error:
        print(f"{path} is not a table of this device and will be replaced: {error}", flush=True)
        return []
    table = json.loads(text)
    table.pop("launches", None)  # measured again behind the entries
    if table == {"version": TABLE_VERSION, **header, "entries": table["entries"]}:
        return table["entries"]
    print(f"{path} was measured with other versions; its {len(table['entries'])} entries will be replaced", flush=True)
    return []


def with_entry(entries: list[dict], entry: dict) -> list[dict]:
    """`entries` with what they say of the same problem replaced."""
    place = ("stage", "dtype", "n", "k", "m_max")
    return [other for other in entries if any(other[name] != entry[name] for name in place)] + [entry]


def write_table(path: Path, header: dict, entries: list[dict], launches: dict | None = None) -> None:
    """The table, written beside and renamed."""
    table = {"version": TABLE_VERSION, **header, **({"launches": launches} if launches else {}), "entries": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.partial")
    beside.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def compile_errors() -> tuple[type[Exception], ...]:
    """What the compiler raises for one tile; another error is a defect, and ends the search."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    return CompilationError, PTXASError


class Bench:
    """Operands of one problem on the GPU, and the time of one way to compute it."""

    def __init__(self, problem: Problem, dtype: torch.dtype, batch: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator).to(dtype)

        self._problem, self._expected, self._flush = problem, None, Flush("cuda")
        # As the chain has them: the tower's blocks with CLS cut off by a view, every later operand dense. A weight
        # gradient that the library takes without a copy is not the kernel's to compute.
        skip = 1 if problem.num_blocks > 1 or problem.wgrad else 0
        shape = batch, problem.source_tokens + skip, problem.c
        self._blocks = [draw(*shape)[:, skip:] for _ in range(problem.num_blocks)]
        self._weight, self._bias = draw(problem.n, problem.k) / problem.k**0.5, draw(problem.n)
        self._g = draw(batch * problem.tokens, problem.n) if problem.wgrad else None

    def compile(self, configs: Sequence[GemmConfig]) -> None:
        """All of them at once, on every core, before the first is measured."""
        with compiling_ahead():
            for config in configs:
                with contextlib.suppress(*launch.does_not_run()):  # what does not run is noted when it is measured
                    self._run(config)

    def microseconds(self, config: GemmConfig | None) -> float | None:
        """Median on a cold cache; config None is the torch path (cuBLAS). None where it does not run."""

        def run() -> Tensor:
            return self._run(config)

        try:
            found = run()
            if config is not None:
                self._check(found)
            graph = capture(run)
            replay(graph, self._flush, _WARM_UP)
            return statistics.median(replay(graph, self._flush, _REPEATS))
        except launch.does_not_run():
            return None
        except (*compile_errors(), RuntimeError) as error:
            if not isinstance(error, compile_errors()) and "PassManager" not in str(error):
                raise  # a RuntimeError of the compiler's passes is one tile's; another one is a defect
            print(f"{self._problem.name}: {config} does not compile: {str(error).splitlines()[0]:.100}", flush=True)
            return None

    def _run(self, config: GemmConfig | None) -> Tensor:
        if self._g is not None:
            shape = self._weight.shape
            if config is None:
                return weight_grad.by_library(self._g, self._blocks, shape, self._problem.stage)
            return weight_grad.launch_segmented_wgrad(self._g, self._blocks, self._problem.stage, config)
        operands = (self._blocks, self._weight, self._bias, self._problem.stage)
        if config is None:
            return torch_path.run_stage(*operands, False)[0]
        return launch.launch_stage(*operands, config, strict=True)[0]

    def _check(self, found: Tensor) -> None:
        """A configuration that computes something else is a defect to report, not a time to note."""
        if self._expected is None:
            self._expected = self._run(None)
        error = (found.double() - self._expected.double()).norm() / self._expected.double().norm()
        if not error < (0.02 if found.dtype != torch.float32 else 2e-3):  # some roundings of 16 bit, of tf32
            raise RuntimeError(f"{self._problem.name}: the kernel differs from the torch path by {float(error):.3g}")
