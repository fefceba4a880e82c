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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

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


class Product(NamedTuple):
    """One product on its operands, for any configuration. Results are y and, if saved, the pre-activation; or dW."""

    device: torch.device
    columns: int  # of every result
    factor: Tensor  # [..., terms of a sum]: W; a term that is zero in all of it shows nobody whether it is read
    new: Callable[[], tuple[Tensor, ...]]  # memory for the results
    arguments: Callable[[GemmConfig, tuple[Tensor, ...]], tuple]  # as launch.ARGUMENTS, of a launch into such memory
    library: Callable[[], tuple[Tensor, ...]]  # the results by plain torch
    exact: Callable[[Tensor], tuple[Tensor, ...]]  # the results' rows of these numbers, in float64
    drawn: Callable[[], "Product"]  # the same on random operands


def of_stage(
    arguments: Callable[[GemmConfig, tuple], tuple],
    operands: tuple[Sequence[Tensor], Tensor, Tensor | None],
    stage: Stage,
    save_pre: bool,
    out: Tensor | None,
) -> Product:
    """operands: blocks, weight, bias. Where the caller has an out, the rows go to one of our own."""
    blocks, weight, bias = operands
    x, n = blocks[0], weight.shape[0]
    m, kept = x.shape[0] * stage.tokens(x.shape), 2 if save_pre else 1
    rows = None if out is None else torch.arange(m, device=x.device)

    def new() -> tuple[Tensor, ...]:
        y = x.new_empty(stage.out_shape(x.shape, n)) if out is None else out.new_empty(m, n)
        return (y, x.new_empty(m, n))[:kept]

    def into(config: GemmConfig, results: tuple[Tensor, ...]) -> tuple:
        y, pre = (*results, None)[:2]
        return arguments(config, (tuple(blocks), weight, bias, y, pre, rows))

    def library() -> tuple[Tensor, ...]:
        y = None if out is None else new()[0]
        return torch_path.run_stage(blocks, weight, bias, stage, save_pre, out=y, rows=rows)[:kept]

    def exact(rows: Tensor) -> tuple[Tensor, ...]:
        if stage.merge_out > 1:  # rows of y -> rows of the GEMM
            in_order = torch.arange(m, device=x.device).view(*x.shape[:2], 1)
            rows = merge_windows(in_order, stage.grid, stage.merge_out).flatten()[rows]
        a = torch.cat([s[torch.unravel_index(rows, s.shape[:-1])] for s in stage.segments(blocks)], -1).double()
        pre = torch.cat([a @ part.double().t() for part in weight.split(AT_ONCE)], -1)
        pre = pre if bias is None else pre + bias
        return (torch_path.activate(pre, stage.activation), pre)[:kept]

    def drawn() -> Product:
        like = [draw(x) for x in blocks], draw(weight, weight.shape[1] ** -0.5), None if bias is None else draw(bias)
        return of_stage(arguments, like, stage, save_pre, out)

    return Product(x.device, n, weight, new, into, library, exact, drawn)


def draw(x: Tensor, scale: float = 1.0) -> Tensor:
    """Random numbers that lie as x does; the caller's generators stay as they are."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    generator = torch.Generator(x.device).manual_seed(0)
    memory = torch.randn(span, generator=generator, device=x.device, dtype=x.dtype)
    return memory.mul_(scale).as_strided(x.shape, x.stride())


def measure(
    make: Callable[[], Product], configs: Sequence[GemmConfig], failed: dict[GemmConfig, str], rounds: int
) -> dict[GemmConfig | None, float]:
    """Microseconds of plain torch (None) and of every configuration that is right, for the product that `make` gives.

    One that is wrong or does not run is in `failed` with its reason, as soon as that is known; one that these operands
    do not suit is left out. What is not a configuration's fault is raised: no memory left, a device that is gone.
    """
    product = make()
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
        self.factor = product.factor
        self.results = [result.view(-1, product.columns) for result in product.library()]
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
        seen = bool(self.factor.any(0).all())
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
