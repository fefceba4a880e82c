"""Which way to compute a product is right, and how fast each is, on the operands at hand.

run      plain torch, and every candidate into memory of its own that holds NaN
right    on up to ROWS rows  |candidate - exact| <= 2 * |torch - exact| + 1e-6, maxima, exact in float64, and
         plain torch in fp32 no better than one long sum, for its library may share one out over K;
         on all rows no NaN, and no row further from torch's than some of torch's own errors
timed    what is right, in turns, on a cold L2 (timing.py)
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..backend import on_device
from ..configs import GemmConfig
from . import tma, torch_path
from .segments import Stage, merge_windows

ROWS = 256
ONE_SUM = 1.5e-5  # error in fp32 over the results' root mean square, at the most, of a sum of 16384 products
_HEAD_START = 400_000  # cycles that the device waits while the host queues a call, whose own time counts for nothing
AT_ONCE = 1024  # rows, or rows of W, that are widened at once


@dataclass(eq=False)
class Product:
    """One stage on its operands, for any configuration. Results are y and, if saved, the pre-activation."""

    forms: Mapping[str, Callable[[GemmConfig, tuple, Stage], tuple]]  # launch.ARGUMENTS
    blocks: Sequence[Tensor]
    weight: Tensor
    bias: Tensor | None
    stage: Stage
    save_pre: bool = False
    out: Tensor | None = None  # the caller's; a trial writes its rows into one of our own

    def __post_init__(self) -> None:
        x = self.blocks[0]
        self.device, self.m = x.device, x.shape[0] * self.stage.tokens(x.shape)

    @functools.cached_property
    def rows(self) -> Tensor | None:
        return None if self.out is None else torch.arange(self.m, device=self.device)

    def new(self) -> tuple[Tensor, ...]:
        """Memory for the results."""
        x, n = self.blocks[0], self.weight.shape[0]
        y = x.new_empty(self.stage.out_shape(x.shape, n)) if self.out is None else self.out.new_empty(self.m, n)
        return (y, x.new_empty(self.m, n)) if self.save_pre else (y,)

    def arguments(self, config: GemmConfig, results: tuple[Tensor, ...]) -> tuple:
        """Of a launch into such memory."""
        y, pre = (*results, None)[:2]
        tensors = tuple(self.blocks), self.weight, self.bias, y, pre, self.rows
        return self.forms[config.form](config, tensors, self.stage)

    def library(self) -> tuple[Tensor, ...]:
        """The results by plain torch."""
        out, kept = None if self.out is None else self.new()[0], 2 if self.save_pre else 1
        operands = self.blocks, self.weight, self.bias, self.stage, self.save_pre
        return torch_path.run_stage(*operands, out=out, rows=self.rows)[:kept]

    def exact(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The results' rows of these numbers, in float64."""
        stage, x = self.stage, self.blocks[0]
        if stage.merge_out > 1:  # rows of y -> rows of the GEMM
            in_order = torch.arange(self.m, device=x.device).view(*x.shape[:2], 1)
            rows = merge_windows(in_order, stage.grid, stage.merge_out).flatten()[rows]
        a = torch.cat([s[torch.unravel_index(rows, s.shape[:-1])] for s in stage.segments(self.blocks)], -1).double()
        pre = torch.cat([a @ part.double().t() for part in self.weight.split(AT_ONCE)], -1)
        pre = pre if self.bias is None else pre + self.bias
        y = torch_path.activate(pre, stage.activation)
        return (y, pre) if self.save_pre else (y,)

    def drawn(self) -> "Product":
        """The same on random operands."""
        blocks, weight = [draw(x) for x in self.blocks], draw(self.weight, self.weight.shape[1] ** -0.5)
        return replace(self, blocks=blocks, weight=weight, bias=None if self.bias is None else draw(self.bias))


def draw(x: Tensor, scale: float = 1.0) -> Tensor:
    """Random numbers that lie as x does; the caller's generators stay as they are."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    generator = torch.Generator(x.device).manual_seed(0)
    memory = torch.randn(span, generator=generator, device=x.device, dtype=x.dtype)
    return memory.mul_(scale).as_strided(x.shape, x.stride())


def measure(
    product: Product, configs: Sequence[GemmConfig], failed: dict[GemmConfig, str], rounds: int
) -> dict[GemmConfig | None, float]:
    """Microseconds of plain torch (None) and of every configuration that is right.

    One that is wrong or does not run is in `failed` with its reason, as soon as that is known; one that these operands
    do not suit is left out. What is not a configuration's fault is raised: no memory left, a device that is gone.
    """
    with on_device(product.device), torch.no_grad(), torch.autocast(product.device.type, enabled=False):
        expected = Expected(product)
        if not expected.tells:
            product = product.drawn()
            expected = Expected(product)
        compile_all(product, configs, failed)
        right: list[GemmConfig | None] = [None]
        for config in configs:
            if config not in failed:
                with _blaming(config, failed):
                    if reason := expected.differs(run(product, config, poison=True)):
                        failed[config] = reason
                    else:
                        right.append(config)
        del expected
        calls = [functools.partial(run, product, config) for config in right]
        return dict(zip(right, medians(calls, product.device, rounds), strict=True))


def run(product: Product, config: GemmConfig | None, *, poison: bool = False) -> tuple[Tensor, ...]:
    """The results; poison: in memory that holds NaN, as does the room for the parts of a split K."""
    if config is None:
        return product.library()
    results = product.new()
    kernel, grid, operands, sizes, constants = product.arguments(config, results)
    if poison:
        for memory in (*results, *(operands[-2:-1] if config.split_k > 1 else ())):
            memory.fill_(float("nan"))
    kernel[grid](*operands, *sizes, **constants, **config.compiler_options())
    return results


def compile_all(product: Product, configs: Sequence[GemmConfig], failed: dict[GemmConfig, str]) -> None:
    """All of them at once, on every core."""
    results = product.new()

    def compile_one(config: GemmConfig) -> None:
        with on_device(product.device), _blaming(config, failed):  # a thread begins on the first device
            kernel, grid, operands, sizes, constants = product.arguments(config, results)
            kernel.warmup(*operands, *sizes, grid=grid, **constants, **config.compiler_options())

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        list(pool.map(compile_one, configs))
    finally:  # an interrupted call does not wait for the compiler
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _blaming(config: GemmConfig, failed: dict[GemmConfig, str]) -> Iterator[None]:
    """What a configuration raises is noted, unless it is out of memory or disk, operands that do not suit it, or
    another thread's capture of a graph, which forbids this one to allocate or to wait."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:  # the compiler raises what it likes
        if "out of memory" in str(error) or "captur" in str(error):  # as Triton and CUDA say it
            raise
        if not tma.is_refusal(config, error):
            failed[config] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
        try:
            torch.cuda.synchronize()
        except Exception:
            raise error from None


class Expected:
    """The results of plain torch, and how far others may be from them."""

    def __init__(self, product: Product) -> None:
        self.weight = product.weight
        self.results = [result.view(-1, len(self.weight)) for result in product.library()]
        total = len(self.results[0])
        self.rows = torch.linspace(0, total - 1, min(total, ROWS), dtype=torch.float64, device=product.device).long()
        self.exact = product.exact(self.rows)
        errors = [result[self.rows] - exact for result, exact in zip(self.results, self.exact, strict=True)]
        of_size = ONE_SUM if self.results[0].dtype == torch.float32 else 0.0
        least = [of_size * exact.square().mean().sqrt() for exact in self.exact]
        self.allowed = [2 * max(error.abs().max(), one) + 1e-6 for error, one in zip(errors, least, strict=True)]
        self.share = [8 * error.norm() / exact.norm() + 1e-3 for error, exact in zip(errors, self.exact, strict=True)]

    @property
    def tells(self) -> bool:
        """Not of zeros, repeated rows or NaN, as a first call is often made on, nor of a warm start's weights, half of
        whose columns are zero: a wrong kernel would pass, or none."""
        last = self.exact[-1]
        alike = any(last.shape[dim] > 1 and not last.diff(dim=dim).any() for dim in (0, 1))
        seen = bool(self.weight.any(0).all())
        return seen and not alike and all(part.isfinite().all() for y in self.results for part in y.split(AT_ONCE))

    def differs(self, results: Sequence[Tensor]) -> str | None:
        """Why results are wrong, or None."""
        for result, torchs, exact, allowed, share in zip(
            results, self.results, self.exact, self.allowed, self.share, strict=True
        ):
            found = result.view(torchs.shape)
            if not (error := (found[self.rows] - exact).abs().max()) <= allowed:
                return f"wrong: an error of {error:.2g} against float64, where {allowed:.2g} is allowed"
            for part, expected in zip(found.split(AT_ONCE), torchs.split(AT_ONCE), strict=True):
                size, distance = (torch.linalg.vector_norm(x.float(), dim=1) for x in (expected, part - expected))
                if not (distance <= share * (size + size.mean())).all():
                    return "wrong: some rows are far from plain torch's, or were not written"
        return None


class Flush:
    """Evicts L2 by reading a buffer of four times its size: what a write leaves behind would be written back later, at
    the expense of the timed call."""

    def __init__(self, device: str) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
        self.buffer = torch.ones(max(size // 4, 1), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        self.buffer.sum()


def in_turns(calls: Sequence[Callable[[], Any]], flush: Flush, rounds: int) -> list[list[float]]:
    """Microseconds of each call in every round, L2 flushed before it; each round begins with another call."""
    taken: list[list[float]] = [[] for _ in calls]
    turns = [(first + i) % len(calls) for first in range(rounds) for i in range(len(calls))]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in "be"] for _ in turns]
    for i, (begin, end) in zip(turns, marks, strict=True):
        torch.cuda._sleep(_HEAD_START)
        flush()
        begin.record()
        calls[i]()
        end.record()
    marks[-1][1].synchronize()  # this stream alone: others may wait for other processes
    for i, (begin, end) in zip(turns, marks, strict=True):
        taken[i].append(1e3 * begin.elapsed_time(end))
    return taken


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, most: int) -> list[float]:
    """Microseconds of each call, of `most` rounds, or of fewer, three at least, where a round takes long."""
    flush, began = Flush(str(device)), time.monotonic()
    in_turns(calls, flush, 1)  # a warm-up, too
    rounds = min(most, max(3, int(0.04 * most / (time.monotonic() - began))))
    return list(map(median, in_turns(calls, flush, rounds)))
