"""From a product to its configuration. The first of these that knows the product:

    the device's shipped table     tables.py
    what was selected on it        cache.py: at the first eager call of a product that no table knows, the model's best
                                   of every form and plain torch are checked and timed on the call's own operands
    the model                      model.py: the cheapest portable tile, or plain torch where that is estimated cheaper

choose    for y [m, n] = A [m, k] @ W^T, or for a weight gradient
settled   whether it will say the same at the next call
reject    what serves in place of a configuration that did not run

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
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .cache import KEY, Cache, cache_of
from .config import GemmConfig
from .model import cycles, default_config, library_cycles, others, smallest, tiles
from .tables import device_identity, does_not_suit, multiprocessors, table_of

_log = logging.getLogger(__name__)  # its warnings are seen on stderr where an application has set up no logging
INTERPRETER_CONFIG = GemmConfig(block_m=32, block_n=32, block_k=32, group_m=2)
MARGIN = 0.98  # a kernel must take less than this share of plain torch's time: within the noise plain torch serves

# Microseconds of plain torch (None) and of each candidate that is right; what is wrong or does not run goes into the
# second argument with its reason, as soon as it is known.
Failures = dict[GemmConfig, str]
Choice = tuple[GemmConfig | None]  # of one: None is plain torch, where no tuple means that nothing is known
Measure = Callable[[list[GemmConfig], Failures], dict[GemmConfig | None, float]]
_PER_FORM = 2
_NOT_WORTH_TRYING = 2.0  # times the best estimate
_WORKSPACE = 1 << 28  # bytes that the parts of a split K may take
_MOST_ATTEMPTS = 3

# (slug, itemsize, of a weight gradient, configuration) that did not run in this process: the two kernels share tiles.
_rejected: set[tuple[str, int, bool, GemmConfig]] = set()
_attempts: Counter[tuple] = Counter()
_selecting = threading.Lock()
_said: set[str] = set()
_listeners: list[list[dict[str, Any]]] = []


def choose(
    device: torch.device,
    stage: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    forced: bool = False,
    save_pre: bool = False,
    measure: Measure | None = None,
) -> GemmConfig | None:
    """The configuration for y [m, n] = A [m, k] @ W^T at a stage of `tables.STAGES` on `device`, or for the weight
    gradient dW [m, n], a sum over k rows, at one of `tables.WGRAD_STAGES`.

    None is plain torch, never if `forced`; a weight gradient is also the library's where no table and no selection
    names the kernel, and where that did not run. save_pre: the pre-activation is stored too. measure: of the call's own
    operands; without it nothing is selected.
    """
    if device.type == "cpu":  # the interpreter: nothing there depends on speed
        return INTERPRETER_CONFIG
    index = _index(device)
    wgrad, what, cache = stage.endswith("_wgrad"), (stage, dtype, m, n, k, save_pre), cache_of(*device_identity(index))
    source, known = "table", _tabled(index, *what)
    if known is None and _used():
        source, known = "cache", _cached(cache, what, forced)
        if known is None and measure and not forced:
            if (why := _why_not_now()) is None:
                source, known = "selected", _select(index, what, measure)
            elif why not in _said:
                _said.add(why)
                _log.warning("stf_kernels: %s: a model of the device serves what is not known yet", why)
    if known is None or (forced and known[0] is None):
        source, known = "model", (_model(index, *what, forced),)
    [config], itemsize = known, dtype.itemsize
    rejected = (cache.slug, itemsize, wgrad, config) in _rejected
    if rejected or (source != "table" and (itemsize, wgrad, config) in cache.failed):
        config = smallest(itemsize) if forced and not wgrad else None
    for heard in _listeners:
        heard.append(_said_of(cache, what, source, config))
    return config


@contextlib.contextmanager
def listening() -> Iterator[list[dict[str, Any]]]:
    """What `choose` says meanwhile, in any thread: a backward has one of its own."""
    heard: list[dict[str, Any]] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners[:] = [other for other in _listeners if other is not heard]


def settled(
    device: torch.device, stage: str, dtype: torch.dtype, m: int, n: int, k: int, *, forced: bool, save_pre: bool
) -> bool:
    """Whether `choose` will say the same at the next call: a selection may still be to come."""
    if device.type == "cpu" or forced or not _used():
        return True
    index, what = _index(device), (stage, dtype, m, n, k, save_pre)
    known = _tabled(index, *what) or _cached(cache_of(*device_identity(index)), what, forced)
    return known is not None or _attempts[index, key_of(*what)] >= _MOST_ATTEMPTS


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index  # "cuda" is the current one


def key_of(stage: str, dtype: torch.dtype, m: int, n: int, k: int, save_pre: bool) -> tuple:
    """What a selection is for: the shape of W, and rows of A up to the next power of two or 3/4 of it."""
    rows, *shape = _rows_and_weight(stage, m, n, k)
    power = 1 << max(rows - 1, 0).bit_length()
    bucket = power if 4 * rows > 3 * power else max(3 * power // 4, 1)
    return stage, str(dtype).removeprefix("torch."), *shape, bucket, save_pre, uses_tf32(dtype)


def _rows_and_weight(stage: str, m: int, n: int, k: int) -> tuple[int, int, int]:
    """Rows of A and the shape of W, by which tables and selections know a weight gradient, too."""
    return (k, m, n) if stage.endswith("_wgrad") else (m, n, k)


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


def _used() -> bool:
    return selects() and not torch.are_deterministic_algorithms_enabled()


def _why_not_now() -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and stf_kernels.prepare(module) was not called before"
    return None


def _named(what: tuple) -> str:
    stage, dtype, m, n, k, save_pre = what
    return f"{stage} {str(dtype).removeprefix('torch.')} m {m} n {n} k {k}" + " training" * save_pre


@functools.lru_cache(maxsize=4096)
def _tabled(index: int, stage: str, dtype: torch.dtype, m: int, n: int, k: int, save_pre: bool) -> Choice | None:
    rows, n, k = _rows_and_weight(stage, m, n, k)
    choices = table_of(*device_identity(index)).get((stage, str(dtype).removeprefix("torch."), n, k))
    if not choices:
        return None
    config = next((config for m_max, config in choices if rows <= m_max), choices[-1][1])
    # Beyond the table: split K's workspace would grow with M, gigabytes for what a table of one image says. And tables
    # are measured without the pre-activation's store, which wants smaller tiles.
    few_rows = config is not None and (config.split_k > 1 or config.form == "swap_ab")
    return None if (few_rows and rows > choices[-1][0]) or (save_pre and config is not None) else (config,)


def _cached(cache: Cache, what: tuple, forced: bool) -> Choice | None:
    known = cache.known.get(key_of(*what))
    if known is None or (forced and known.kernel is None):
        return None
    return (known.kernel if forced else known.config,)


@functools.lru_cache(maxsize=4096)
def _model(
    index: int, stage: str, dtype: torch.dtype, m: int, n: int, k: int, save_pre: bool, forced: bool
) -> GemmConfig | None:
    wgrad, arch, count = stage.endswith("_wgrad"), device_identity(index)[1], multiprocessors(index)
    if wgrad and not forced:
        return None
    size = m, n, k, dtype.itemsize, arch, count
    config = default_config(arch, dtype.itemsize, m, n, k, multiprocessors=count, save_pre=save_pre, wgrad=wgrad)
    best = min(_menu(arch, "linear", dtype.itemsize, False), key=lambda other: cycles(other, *size))
    return config if forced or cycles(config, *size) <= library_cycles(best, stage, *size) else None


def _menu(arch: str, stage: str, itemsize: int, save_pre: bool) -> list[GemmConfig]:
    wgrad = stage.endswith("_wgrad")
    found = [*tiles(arch, itemsize, save_pre=save_pre, wgrad=wgrad), *([] if wgrad else others(arch, itemsize))]
    return [config for config in found if does_not_suit(config, arch, stage, itemsize) is None]


def contenders(index: int, stage: str, dtype: torch.dtype, m: int, n: int, k: int, save_pre: bool) -> list[GemmConfig]:
    """What is tried at first use, the most promising first: a few of every form that the architecture has."""
    (slug, arch), itemsize = device_identity(index), dtype.itemsize
    size = m, n, k, itemsize, arch, multiprocessors(index)
    costs = {config: cycles(config, *size) for config in _menu(arch, stage, itemsize, save_pre)}
    failed, found = cache_of(slug, arch).failed, dict[tuple, list[GemmConfig]]()
    for config in sorted(costs, key=costs.__getitem__):
        fits = config.split_k == 1 or 4 * m * n * config.split_k <= _WORKSPACE
        fresh = (itemsize, stage.endswith("_wgrad"), config) not in failed
        if fits and fresh and costs[config] <= _NOT_WORTH_TRYING * min(costs.values()):
            found.setdefault((config.form, config.split_k > 1), []).append(config)
    return sorted((c for form in found.values() for c in form[:_PER_FORM]), key=costs.__getitem__)


def _select(index: int, what: tuple, measure: Measure) -> Choice:
    """Measure, keep what was found, say so in one line -> what serves this call, plain torch if nothing was found."""
    cache, attempt, began = cache_of(*device_identity(index)), (index, key_of(*what)), time.monotonic()
    with _selecting:
        if _cached(cache, what, False) is None:
            cache.read()  # another process may have selected meanwhile
        if known := _cached(cache, what, False):  # or another thread
            return known
        if _attempts[attempt] >= _MOST_ATTEMPTS:
            return (None,)
        failed: Failures = {}
        try:
            us = measure(contenders(index, *what), failed)
        except Exception as error:
            _attempts[attempt] += 1
            _keep(cache, what, {}, failed)
            line = (str(error).splitlines() or [""])[0]
            said = f"stf_kernels: selecting for {_named(what)} on {cache.slug} ended in {type(error).__name__}: {line}"
            try:
                torch.cuda.synchronize(index)
            except Exception as again:
                if "captur" not in str(again):  # or another thread captures a graph, which forbids to wait
                    _log.error("%s. The device does not answer any more; a new process will not try this again", said)
                    raise error from None
            _log.warning("%s. Plain torch serves; attempt %d of %d", said, _attempts[attempt], _MOST_ATTEMPTS)
            return (None,)
        _keep(cache, what, us, failed)
    config = cache.known[key_of(*what)].config
    _log.warning(
        "stf_kernels: selected for %s on %s: %s, %.1f us (torch: %.1f us), among %d in %.1f s; kept in %s",
        _named(what), cache.slug, config or "plain torch", us[config], us[None], len(us),
        time.monotonic() - began, cache.path,
    )  # fmt: skip
    return (config,)


def _keep(cache: Cache, what: tuple, us: dict[GemmConfig | None, float], failed: Failures) -> None:
    key, entries = dict(zip(KEY, key_of(*what), strict=True)), []
    if us:
        candidates = [{"config": config and config.to_dict(), "us": time} for config, time in us.items()]
        entries.append(entry_of(key, us) | {"m": what[2], "candidates": candidates})
    place = {name: key[name] for name in ("stage", "dtype")}
    records = [place | {"config": config.to_dict(), "reason": reason} for config, reason in failed.items()]
    if entries or records:
        cache.add(entries, records)
    if failed:
        listed = "; ".join(f"{config}: {reason}" for config, reason in failed.items())
        said = f"stf_kernels: not used on {cache.slug} any more, found for {_named(what)}: {listed}"
        warnings.warn(said, stacklevel=2)


def entry_of(place: dict, us: dict[GemmConfig | None, float]) -> dict:
    """An entry of a table at a place (stage, dtype, n, k, m_max), from the microseconds of plain torch (None) and of
    configurations, with the measurement that justifies it."""
    kernels = {config: time for config, time in us.items() if config is not None}
    best = min(kernels, key=kernels.__getitem__, default=None)
    wins = best is not None and us[best] < MARGIN * us[None]
    return place | {
        "provider": "triton" if wins else "torch",
        "config": best.to_dict() if wins else None,
        "us": us[best if wins else None],
        "rival": "torch" if wins else "triton",
        "rival_us": us[None] if wins else kernels.get(best),
    }


def _said_of(cache: Cache, what: tuple, source: str, config: GemmConfig | None) -> dict[str, Any]:
    stage, dtype, m, n, k, save_pre = what
    known = cache.known.get(key_of(*what)) if source in ("cache", "selected") else None
    us = {} if known is None else known.us
    said = {"stage": stage + " training" * save_pre, "dtype": str(dtype).removeprefix("torch."), "m": m, "n": n, "k": k}
    serves = "plain torch" if config is None else str(config)
    return said | {"serves": serves, "us": us.get(config), "torch us": us.get(None), "by": source}


def reject(
    device: torch.device, dtype: torch.dtype, config: GemmConfig, error: Exception, *, forced: bool, wgrad: bool = False
) -> GemmConfig | None:
    """Do not choose a configuration again on a device in this process, warn once -> what serves instead.

    None is plain torch; if `forced` it is the smallest configuration, and where that is rejected `error` is raised.
    """
    slug, arch = device_identity(_index(device))
    instead = smallest(dtype.itemsize) if forced else None
    if config == instead:
        raise error
    rejected = slug, dtype.itemsize, wgrad, config
    if rejected not in _rejected:
        _rejected.add(rejected)
        said = f"stf_kernels: {config} does not run on {slug} ({arch}): {error}. {instead or 'Plain torch'} serves"
        warnings.warn(said, stacklevel=3)
    return instead
