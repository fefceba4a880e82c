"""From a product to its configuration. The first of these that knows the product:

    the device's shipped table     tables.py
    what was selected on it        the user's cache: at the first eager call of a product that no table knows, the
                                   model's best of every form and plain torch are checked and timed on its own operands
    the model                      model.py: the cheapest portable tile, or plain torch where that is estimated cheaper

Nothing is selected while a CUDA graph is captured or torch.compile traces. With STF_KERNELS_SELECT=off, or under
torch's deterministic algorithms, what was selected before is not used either.
"""

import contextlib
import functools
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .config import GemmConfig
from .model import LIBRARY, copy_cycles, cycles, default_config, does_not_suit, others, tiles
from .tables import Known, Table, cache_of, device_identity, multiprocessors, table_of

_log = logging.getLogger(__name__)  # its warnings are seen on stderr where an application has set up no logging
INTERPRETER_CONFIG = GemmConfig(block_m=32, block_n=32, block_k=32, group_m=2)
# A kernel must take less than this share of plain torch's time, and so many microseconds less: within the noise plain
# torch serves, and a launch of ours costs the host more than torch's calls do (bench/TUNING.md, row 42).
MARGIN, WORTH = 0.98, 10.0

# ops/first_use.measure on a call's own operands: (candidates, failures, rounds of timing) -> microseconds
Failures = dict[GemmConfig, str]
Measure = Callable[[list[GemmConfig], Failures, int], dict[GemmConfig | None, float]]
_NOT_WORTH_TRYING = 2.0  # times the best estimate
_WORKSPACE = 1 << 28  # bytes that the parts of a split K may take
_MOST_ATTEMPTS = 3
_FOR_NOW = Known(None, {})  # a selection that failed

_attempts: Counter[tuple] = Counter()
_selecting = threading.Lock()
_said: set[str] = set()
_listeners: list[list[dict[str, Any]]] = []


class Gemm(NamedTuple):
    """y [m, n] = A [m, k] @ W^T at a stage of `tables.STAGES`, with the pre-activation stored, too, if save_pre."""

    stage: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    save_pre: bool = False

    def key(self) -> tuple:
        """tables.KEY: for rows of A up to the next power of two or 3/4 of it."""
        power = 1 << max(self.m - 1, 0).bit_length()
        m_max = power if 4 * self.m > 3 * power else max(3 * power // 4, 1)
        return self.stage, self.named()["dtype"], self.n, self.k, m_max, self.save_pre, uses_tf32(self.dtype)

    def size(self, index: int) -> tuple:
        """What the model asks of it on a GPU."""
        return self.m, self.n, self.k, self.dtype.itemsize, device_identity(index)[1], multiprocessors(index)

    def named(self) -> dict[str, Any]:
        stage = self.stage + " training" * self.save_pre
        return self._asdict() | {"stage": stage, "dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        return "{stage} {dtype} m {m} n {n} k {k}".format(**self.named())


def choose(
    device: torch.device, gemm: Gemm, *, forced: bool = False, measure: Measure | None = None
) -> tuple[GemmConfig | None, bool]:
    """(configuration for a product on `device`, whether the next call will get the same: no selection is to come).

    None is plain torch, never if `forced`. measure: of the call's own operands; without it nothing is selected.
    """
    if device.type == "cpu":  # the interpreter: nothing there depends on speed
        return INTERPRETER_CONFIG, True
    index = _index(device)
    used = selects() and not torch.are_deterministic_algorithms_enabled()
    cache, source, shipped = _kept(index), "table", table_of(*device_identity(index))
    known = None if search.table else shipped.known.get(gemm.key())
    if known is None and used:
        source, known = "cache", cache.known.get(gemm.key())
        if known is None and measure and not forced:
            if (why := _why_not_now()) is None:
                source, known = "selected", _select(index, gemm, measure)
            elif why not in _said:
                _said.add(why)
                _log.warning("stf_kernels: %s: a model of the device serves what is not known yet", why)
    settled = forced or not used or known not in (None, _FOR_NOW)
    config, us = (None, {}) if known is None else (known.kernel if forced else known.config, known.us)
    if known is None or (forced and config is None):
        source, config, us = "model", _model(index, gemm, forced), {}
    if (gemm.dtype.itemsize, config) in cache.failed and not forced:
        config = None
    for heard in _listeners:
        serves = {"serves": str(config or "plain torch"), "us": us.get(config), "torch us": us.get(None), "by": source}
        heard.append(gemm.named() | serves)
    return config, settled


@contextlib.contextmanager
def listening() -> Iterator[list[dict[str, Any]]]:
    """What `choose` says meanwhile, in any thread."""
    heard: list[dict[str, Any]] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners[:] = [other for other in _listeners if other is not heard]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index  # "cuda" is the current one


def uses_tf32(dtype: torch.dtype) -> bool:
    """fp32 operands are multiplied as torch does it: IEEE unless torch.backends.cuda.matmul allows TF32."""
    return dtype == torch.float32 and torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def selects() -> bool:
    """STF_KERNELS_SELECT, read at the first call that needs it."""
    value = os.environ.get("STF_KERNELS_SELECT") or "first_use"
    if value not in ("first_use", "off"):
        raise ValueError(f"STF_KERNELS_SELECT: expected 'first_use' or 'off', got {value!r}")
    return value == "first_use"


def _why_not_now() -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and stf_kernels.prepare(module) was not called before"
    return None


@functools.lru_cache(maxsize=4096)
def _model(index: int, gemm: Gemm, forced: bool) -> GemmConfig | None:
    m, n, k, itemsize, arch, count = size = gemm.size(index)
    config = default_config(arch, itemsize, m, n, k, multiprocessors=count, save_pre=gemm.save_pre)
    every = menu(arch, itemsize, save_pre=False)
    best = min(cycles(other, *size) for other in every if does_not_suit(other, arch, "linear", itemsize) is None)
    plain = LIBRARY * best + copy_cycles(gemm.stage, *size)
    return config if forced or cycles(config, *size) <= plain else None


def menu(arch: str, itemsize: int, *, save_pre: bool) -> list[GemmConfig]:
    return [*tiles(arch, itemsize, save_pre=save_pre), *others(arch, itemsize)]


class Search(NamedTuple):
    """What a selection tries, and where it is kept: at first use, unlike in tune, a few of every form that there is."""

    menu: Callable[..., Iterable[GemmConfig]] = menu
    kind: Callable[[GemmConfig], Hashable] = lambda config: (config.form, config.split_k > 1)
    of_a_kind: int = 2
    most: int = 10
    rounds: int = 12
    table: Table | None = None  # None: the user's cache


search = Search()


def contenders(index: int, gemm: Gemm) -> list[GemmConfig]:
    """What is tried, the most promising first, without what the model estimates at over twice its best."""
    size, itemsize, arch = gemm.size(index), gemm.dtype.itemsize, device_identity(index)[1]
    costs = {
        config: cycles(config, *size)
        for config in search.menu(arch, itemsize, save_pre=gemm.save_pre)
        if does_not_suit(config, arch, gemm.stage, itemsize) is None
        if config.split_k == 1 or 4 * gemm.m * gemm.n * config.split_k <= _WORKSPACE
        if (itemsize, config) not in _kept(index).failed
    }
    found, promising = Counter[Hashable](), []
    for config in sorted(costs, key=costs.__getitem__):
        found[search.kind(config)] += 1
        if found[search.kind(config)] <= search.of_a_kind and costs[config] <= _NOT_WORTH_TRYING * min(costs.values()):
            promising.append(config)
    return promising[: search.most]


def _kept(index: int) -> Table:
    """What was selected on a GPU."""
    return search.table or cache_of(*device_identity(index))


def _select(index: int, gemm: Gemm, measure: Measure) -> Known:
    """Measure, keep what was found, say so in one line -> what serves this call, plain torch if nothing was found."""
    cache, key, began = _kept(index), gemm.key(), time.monotonic()
    with _selecting:
        if key not in cache.known:
            cache.read()  # another process may have selected meanwhile
        if key in cache.known:  # or another thread
            return cache.known[key]
        if _attempts[index, key] >= _MOST_ATTEMPTS:
            return _FOR_NOW
        failed: Failures = {}
        try:
            us = measure(contenders(index, gemm), failed, search.rounds)
        except Exception as error:
            _attempts[index, key] += 1
            _keep(cache, gemm, {}, failed)
            line = (str(error).splitlines() or [""])[0]
            said = f"stf_kernels: selecting for {gemm} on {cache.slug} ended in {type(error).__name__}: {line}"
            try:
                torch.cuda.synchronize(index)
            except Exception as again:
                if "captur" not in str(again):  # or another thread captures a graph, which forbids to wait
                    _log.error("%s. The device does not answer any more; a new process will not try this again", said)
                    raise error from None
            _log.warning("%s. Plain torch serves; attempt %d of %d", said, _attempts[index, key], _MOST_ATTEMPTS)
            return _FOR_NOW
        best = Known(None, us).kernel
        config = best if best is not None and us[best] < min(MARGIN * us[None], us[None] - WORTH) else None
        _keep(cache, gemm, {key: Known(config, us)}, failed)
    _log.warning(
        "stf_kernels: selected for %s on %s: %s, %.1f us (torch: %.1f us), among %d in %.1f s; kept in %s",
        gemm, cache.slug, config or "plain torch", us[config], us[None], len(us),
        time.monotonic() - began, cache.path,
    )  # fmt: skip
    return cache.known[key]


def _keep(cache: Table, gemm: Gemm, known: dict[tuple, Known], failed: Failures) -> None:
    """For this process, and in the file."""
    cache.known |= known
    for config, reason in failed.items():
        cache.failed[gemm.dtype.itemsize, config] = f"{gemm}: {reason}"
    try:
        if known or failed:
            cache.write()
    except (OSError, ImportError) as error:  # no fcntl on Windows
        cache.warn(f"cannot be written, so what is selected serves this process alone: {error}")
    if failed:
        listed = "; ".join(f"{config}: {reason}" for config, reason in failed.items())
        warnings.warn(f"stf_kernels: not used on {cache.slug} any more, found for {gemm}: {listed}", stacklevel=2)


def reject(device: torch.device, dtype: torch.dtype, config: GemmConfig, error: Exception) -> None:
    """Do not choose a configuration again on a device, for it does not run there: plain torch serves. Warns once."""
    cache, rejected = _kept(_index(device)), (dtype.itemsize, config)
    if rejected not in cache.failed:
        cache.failed[rejected] = f"does not run: {error}"
        warnings.warn(f"stf_kernels: {config} does not run on {cache.slug}: {error}. Plain torch serves", stacklevel=3)
