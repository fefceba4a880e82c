"""If these fail, operators and modules disturb each other in threads or in worker processes, an error in the middle
leaves something behind, or memory grows with the number of calls."""

import ctypes
import functools
import gc
import itertools
import multiprocessing
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.modules import build
from support.processes import python

from stf_kernels import CompactTokenProjector, spatial_merge_linear, use_backend
from stf_kernels.backend import current_backend
from stf_kernels.ops import torch_path

CALLS, WARM_UP = 10_000, 5_000  # until then caches fill


def step(seed: int, projector: torch.nn.Module | None = None) -> list[np.ndarray]:
    """Output and gradients of a projector, by default one of its own, on blocks that the seed draws."""
    draw = torch.Generator().manual_seed(seed)
    if projector is None:
        projector = build("CompactTokenProjector")
        for parameter in projector.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)
    blocks = [torch.randn(2, 16, 8, generator=draw).requires_grad_() for _ in range(3)]
    y = projector(blocks)
    return [t.detach().numpy() for t in (y, *torch.autograd.grad(y.square().sum(), [*blocks, *projector.parameters()]))]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, found, expected))


def test_threads_with_one_module_and_backends_of_their_own():
    projector = build("CompactTokenProjector")
    expected = [step(seed, projector) for seed in range(8)]

    def work(seed: int) -> None:
        for turn in range(25):
            outer, inner = ("auto", "torch") if (seed + turn) % 2 else ("torch", "auto")
            with use_backend(outer):
                with use_backend(inner), use_backend(inner):
                    assert current_backend() == inner
                    assert same(step(seed, projector), expected[seed])
                assert current_backend() == outer

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert current_backend() == "auto"


def compute_in_workers(method: str) -> None:
    """Of a process that has computed: a fork inherits what is cached. One thread, as in a DataLoader's workers: with
    more a fork of torch waits for threads that are not there."""
    expected = step(5)
    workers = 2 if method == "fork" else 1  # which imports torch
    pool = multiprocessing.get_context(method).Pool(workers, torch.set_num_threads, (1,))
    with pool, use_backend("torch"):
        found = pool.map_async(step, [5] * 4).get(timeout=900)
    assert all(same(one, expected) for one in found)


def test_spawned_workers():
    compute_in_workers("spawn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not live through a fork")
def test_forked_workers():
    """From a process of its own: where a test has used fake tensors, torch's build for CUDA takes itself to have eight
    GPUs, starts autograd's threads for them, and then computes no gradients in a fork."""
    code = "from training.test_long_runs import compute_in_workers; compute_in_workers('fork')"
    done = python("-c", code, PYTHONPATH="tests")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_the_middle_leaves_nothing_behind(monkeypatch, where):
    projector = build("CompactTokenProjector")
    expected, calls, activate = step(3, projector), itertools.count(), torch_path.activate

    def fails(*arguments, **options):
        if where == "backward" or next(calls) == 2:  # the third of four stages
            raise KeyError("in the middle")
        return activate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch_path, "activate" if where == "forward" else "activation_bwd", fails)
        with pytest.raises(KeyError), use_backend("torch"):
            step(3, projector)
    assert current_backend() == "auto"
    assert all(parameter.grad is None for parameter in projector.parameters())
    assert same(step(3, projector), expected)


CACHE = functools._lru_cache_wrapper


class Mallinfo2(ctypes.Structure):
    """glibc's; in bytes, of all threads. used: the caller's; mapped: those of large requests, besides."""

    NAMES = "arena ordblks smblks hblks mapped usmblks fsmblks used free keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


LIBC = ctypes.CDLL(None)
if hasattr(LIBC, "mallinfo2"):
    LIBC.mallinfo2.restype = Mallinfo2


def in_use() -> tuple[int, int]:
    """Bytes of malloc's, in which tensors and their graphs lie, and blocks of Python's objects."""
    gc.collect()
    malloc = LIBC.mallinfo2()
    return malloc.used + malloc.mapped, sys.getallocatedblocks()


def caches() -> dict[str, int]:
    """Entries of whatever remembers calls in our modules: functools' caches, dicts and sets."""
    found = {}
    for name, module in list(sys.modules.items()):
        for key, value in vars(module).items() if name.startswith("stf_kernels") else ():
            if isinstance(value, CACHE):
                found[f"{name}.{key}"] = value.cache_info().currsize
            elif key.startswith("_") and not key.startswith("__") and isinstance(value, dict | set):
                found[f"{name}.{key}"] = len(value)
            for part, inner in getattr(value, "__dict__", {}).items():
                if not isinstance(value, type) and isinstance(inner, CACHE):
                    found[f"{name}.{key}.{part}"] = inner.cache_info().currsize
    return found


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="asks glibc 2.33 or newer what is in use")
def test_ten_thousand_steps_of_changing_shapes():
    """More grids than any cache holds; a layer of the operator's own takes the other half of the calls.

    What is in use, and not what is resident: that grows by 200 to 400 bytes a step, all of it free memory between what
    malloc has given out, as sizes change. In use were, after the last 5,000 steps, 47 kB less and 20 to 60 blocks more.
    """
    draw, projector = random.Random(0), CompactTokenProjector(2, 4, 6, skip_tokens=1)
    weight = torch.randn(5, 16, requires_grad=True)
    for call in range(CALLS):
        height = draw.randint(1, 60)
        grid = 2 * height, 2 * draw.randint(1, max(1, 120 // height))
        tokens, batch = grid[0] * grid[1], draw.randint(1, 2)
        if call % 2:
            blocks = [torch.randn(batch, 1 + tokens, 4, requires_grad=True) for _ in range(2)]
            projector(blocks, grid).sum().backward()
        else:
            x = torch.randn(batch, tokens, 4, requires_grad=True)
            spatial_merge_linear(x, weight, grid=grid, activation=draw.choice(("gelu", "silu"))).sum().backward()
        if call == WARM_UP:
            before = in_use()
    grown = [now - then for now, then in zip(in_use(), before, strict=True)]
    assert grown[0] < 128 << 10, f"{grown[0]} bytes more in {CALLS - WARM_UP} steps"
    assert grown[1] < 500, f"{grown[1]} objects more in {CALLS - WARM_UP} steps"
    assert sum(caches().values()) < 2000, caches()
