"""What a configuration costs on a GPU, by arithmetic: but for LIBRARY no measurement has calibrated it.

    cycles = programs of the busiest multiprocessor * (K steps * cycles of a step + epilogue) + fill
    a step = the slowest of tensor cores, shared memory, L2, and the issue of instructions
    at least = the bytes of A, W and y over what memory delivers while so many bytes of W are in flight

To change a tile size, change it in the tables below: `default_config` says which of them serves.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .config import GemmConfig


class Architecture(NamedTuple):
    """Of one multiprocessor: bytes of shared memory that one program and all of them may take, multiply-adds a cycle of
    its tensor cores on 16-bit operands, its share of the bytes a cycle that memory and L2 deliver (published rates over
    multiprocessors and boost clock), multiprocessors of a common model, for who has none at hand, and the instruction
    of its tensor cores."""

    shared_limit: int
    shared_total: int
    multiply_adds: int
    memory: float
    l2: float
    multiprocessors: int
    tensor_core: str


ARCHITECTURES = {
    "sm_80": Architecture(166_912, 167_936, 1024, 12.0, 35.0, 108, "HMMA"),
    "sm_89": Architecture(101_376, 102_400, 256, 2.9, 16.0, 128, "HMMA"),
    "sm_90": Architecture(232_448, 233_472, 2048, 15.0, 42.0, 132, "HGMMA"),
    "sm_100": Architecture(232_448, 233_472, 4096, 29.0, 40.0, 148, "UTCHMMA"),
    "sm_120": Architecture(101_376, 102_400, 256, 4.4, 16.0, 170, "HMMA"),
    "gfx942": Architecture(65_536, 65_536, 1024, 8.3, 50.0, 304, "v_mfma"),
}
SHARED_MEMORY_LIMIT = {arch: limits.shared_limit for arch, limits in ARCHITECTURES.items()}
_LATENCY = 1400  # cycles from a request to memory until its bytes are there
_FILL = 2500  # cycles before the first product and behind the last store
# What plain torch's product takes of our best form's cycles: with 0.9 nothing that the model lets serve was slower than
# plain torch on an H200.
LIBRARY = 0.9
_MORE_WORK, _MORE_TIME = 1.1, 1.15  # of a default than the least: for the busiest multiprocessor, by the model

# Tiles of a family (see _family) for 16-bit operands, large to small; fp32 below.
_HALF = {
    # 227 KB of shared memory, warpgroup products. 128x128 with 3 stages leaves room for a second program.
    "sm_90": (
        GemmConfig(128, 256, 64, 8, 8, 4),
        GemmConfig(128, 128, 64, 8, 8, 3),
        GemmConfig(64, 256, 64, 8, 8, 4),
        GemmConfig(64, 128, 128, 8, 8, 4),
    ),
    # 163 KB of shared memory
    "sm_80": (
        GemmConfig(128, 256, 32, 8, 8, 4),
        GemmConfig(128, 128, 32, 8, 8, 4),
        GemmConfig(64, 128, 64, 8, 4, 4),
        GemmConfig(64, 128, 32, 8, 4, 4),
        GemmConfig(64, 64, 64, 8, 4, 4),
    ),
    # 99 KB of shared memory: sm_120 and unknown architectures, too
    "sm_89": (GemmConfig(128, 128, 32, 8, 8, 4), GemmConfig(128, 64, 64, 8, 4, 3), GemmConfig(64, 64, 64, 8, 4, 4)),
    # 64 KB of shared memory, wavefronts of 64 threads
    "gfx942": (GemmConfig(256, 128, 32, 8, 8, 2), GemmConfig(128, 128, 32, 8, 4, 2), GemmConfig(64, 128, 64, 8, 4, 2)),
}
# Hopper and later, both with the operands' tiles brought by TMA. 192 = 3 boxes: 576 rows of an image are three tiles.
# 256x128 is not here: with a GELU on a dense operand it spills.
_TMA = (
    GemmConfig(128, 256, 64, 8, 8, 4, form="tma"),
    GemmConfig(192, 128, 64, 8, 8, 4, form="tma"),
    GemmConfig(128, 128, 64, 8, 8, 5, form="tma"),
)
_SWAP_AB = (
    GemmConfig(128, 128, 64, 8, 8, 5, form="swap_ab", tail_m=16),
    GemmConfig(128, 64, 64, 8, 4, 5, form="swap_ab", tail_m=16),
    GemmConfig(128, 128, 64, 8, 8, 5, 4, form="swap_ab", tail_m=16),
    GemmConfig(128, 64, 64, 8, 4, 5, 2, form="swap_ab", tail_m=16),
)
_FLOAT = {
    # The second with 3 stages spills on sm_100 with Triton 3.6 where the pre-activation is stored.
    "sm_90": (GemmConfig(128, 64, 32, 8, 8, 3), GemmConfig(64, 64, 16, 8, 8, 2)),
    "sm_80": (GemmConfig(128, 64, 32, 8, 8, 3), GemmConfig(64, 64, 16, 8, 8, 3)),
    "sm_89": (GemmConfig(128, 64, 32, 8, 8, 3), GemmConfig(64, 64, 32, 8, 8, 3)),
    "gfx942": (GemmConfig(128, 64, 16, 8, 8, 2), GemmConfig(64, 64, 16, 8, 4, 2), GemmConfig(32, 64, 16, 8, 4, 2)),
}
# (rows, rows of the tail), columns, shares of K; 256 rows by TMA spill where a GELU follows
_EVERY = {
    "tma": (((64, 0), (128, 0), (192, 0)), (64, 128, 256), (1,)),
    "swap_ab": (((64, 16), (128, 16), (128, 32)), (64, 128, 256), (1, 2, 4, 8)),
    "pointer": (((16, 0), (32, 0), (64, 0), (128, 0), (256, 0)), (32, 64, 128, 256), (1, 2, 4, 8)),
}


def _family(arch: str) -> str:
    """The family whose tiles suit an architecture; unknown ones get the tiles that fit the smallest shared memory."""
    if arch.startswith("gfx"):
        return "gfx942"
    return {"sm_90": "sm_90", "sm_100": "sm_90", "sm_103": "sm_90", "sm_80": "sm_80"}.get(arch, "sm_89")


def tiles(arch: str, itemsize: int, *, save_pre: bool = False) -> tuple[GemmConfig, ...]:
    """What may serve when no table matches; save_pre: where the epilogue stores the pre-activation too, without the
    largest tile, which spills there."""
    found = (_HALF if itemsize == 2 else _FLOAT)[_family(arch)]
    return found[1:] if save_pre else found


def others(arch: str, itemsize: int) -> list[GemmConfig]:
    """Forms that have not run on hardware, so no default anywhere: for a search to try."""
    found = [*_TMA, *_SWAP_AB] if has_tma(arch, itemsize) else []
    if not arch.startswith("gfx"):  # kernels/split_k.py says why
        found += [replace(config, split_k=splits) for config in tiles(arch, itemsize)[1:] for splits in (2, 4, 8)]
    return found


def every_tile(arch: str, itemsize: int, *, save_pre: bool = False) -> Iterator[GemmConfig]:
    """For a search with time: each tile with the warps that hold its accumulator, steps, and depths of the pipeline."""
    pipelines = [*itertools.product((64, 32, 128) if itemsize == 2 else (32, 16), (8, 4), (5, 4, 3, 2))]
    for form, (rows, columns, shares) in _EVERY.items():
        for (block_m, tail), block_n, split in itertools.product(rows, columns, shares):
            for block_k, warps, stages in pipelines:
                elements = (block_m + tail) * block_n
                if 512 * warps // 4 <= elements <= 128 * warps * 32:  # registers of a thread
                    yield GemmConfig(block_m, block_n, block_k, 8, warps, stages, split, form, tail)


def has_tma(arch: str, itemsize: int) -> bool:
    """Where TMA feeds warpgroup products or their successors: data-centre GPUs from Hopper on, 16-bit operands."""
    return itemsize == 2 and _family(arch) == "sm_90"


def waves(config: GemmConfig, m: int, n: int, multiprocessors: int) -> tuple[int, int]:
    """(programs of the busiest multiprocessor, elements of y that it computes)."""
    programs = math.ceil(m / config.rows) * math.ceil(n / config.block_n) * config.split_k
    busiest = math.ceil(programs / multiprocessors)
    return busiest, busiest * config.rows * config.block_n


def cycles(config: GemmConfig, m: int, n: int, k: int, itemsize: int, arch: str, multiprocessors: int) -> float:
    """The model's estimate for y [m, n] = A [m, k] @ W^T with an activation behind it."""
    m, n = max(m, 1), max(n, 1)  # a batch of no images has a configuration, too
    device = ARCHITECTURES.get(arch, ARCHITECTURES["sm_89"])
    threads = config.num_warps * (64 if arch.startswith("gfx") else 32)
    registers = min(255, config.rows * config.block_n // threads + 64)
    shared = config.shared_bytes(itemsize) + 1024
    resident = max(1, min(device.shared_total // shared, 2048 // threads, 65536 // (threads * registers)))
    columns = math.ceil(n / config.block_n)
    programs = math.ceil(m / config.rows) * columns * config.split_k
    busiest, _ = waves(config, m, n, multiprocessors)

    rate = device.multiply_adds if itemsize == 2 else 128  # fp32 has the ordinary lanes
    tensor = config.rows * config.block_n * config.block_k / rate
    loaded = (config.rows + config.block_n) * config.block_k * itemsize
    if has_tma(arch, itemsize):  # a warpgroup takes 64 rows and reads their A and W's tile, or its part of that
        high = math.ceil(config.rows / 64)
        beside = max(1, config.num_warps // 4 // high)
        read = high * (64 * beside + config.block_n)
    else:  # as many warps side by side as one above the other
        above = 2 ** math.ceil(math.log2(config.num_warps) / 2)
        read = config.rows * config.num_warps / above + config.block_n * above
    shared_memory = (read * config.block_k * itemsize + loaded) / 128
    l2 = loaded / min(64, device.l2 * multiprocessors / min(programs, multiprocessors))
    issue = config.num_warps * (13 if config.form != "pointer" else 26)
    step = max(tensor, shared_memory, l2, issue)
    overlap = 1.05 if min(resident, busiest) > 1 else 1.15
    steps = math.ceil(k / config.block_k) / config.split_k
    epilogue = config.rows * config.block_n * 0.15
    exposed = busiest if resident == 1 else math.ceil(busiest / resident)
    compute = busiest * steps * step * overlap + exposed * epilogue + _FILL

    at_once = min(programs, multiprocessors * resident)
    in_flight = min(at_once, columns * config.split_k) * (config.num_stages - 1) * config.block_n * config.block_k
    bandwidth = device.memory * multiprocessors
    weights = n * k * itemsize / min(bandwidth, in_flight * itemsize / _LATENCY)
    memory = weights + (m * k + m * n) * itemsize / bandwidth
    # Parts are written and read once more, in fp32 and mostly in L2.
    reduction = 3000 + 2 * 4 * m * n * config.split_k / (2 * bandwidth) if config.split_k > 1 else 0
    return max(compute, memory) + reduction


def copy_cycles(kind: str, m: int, n: int, k: int, itemsize: int, arch: str, multiprocessors: int) -> float:
    """The same of what plain torch reads and writes beside its product: a concatenation or a merge on load copies A and
    passes over y again for its activation, a merge on store copies y; whether a plain linear layer has an activation is
    not known here."""
    device = ARCHITECTURES.get(arch, ARCHITECTURES["sm_89"])
    moved = {"concat": m * k + m * n, "merge": m * k + m * n, "linear_merge": m * n}.get(kind, 0)
    return 2 * moved * itemsize / (device.memory * multiprocessors) + _FILL if moved else 0


def default_config(
    arch: str, itemsize: int, m: int, n: int, k: int, *, multiprocessors: int | None = None, save_pre: bool = False
) -> GemmConfig:
    """What serves for y [m, n] = A [m, k] @ W^T when no table matches, itemsize bytes an element.

    The cheapest, unless it takes several waves and a tile that leaves less of the last one idle costs little more:
    waves are counted, all else in a price is estimated. On sm_90 and sm_100 tiles of 64 rows fill the last wave better
    at some products of up to 16 images, by 10 to 25%, but are estimated at 23 to 49% more time, for they read 1.75
    times as much shared memory: there the cheapest stays (20 of LLaVA-1.5's 294 defaults in 16 bit). On an H200 64x256
    took 1.43 times 128x256 at `concat` with 8 images.
    """
    count = multiprocessors or ARCHITECTURES.get(arch, ARCHITECTURES["sm_89"]).multiprocessors
    menu = tiles(arch, itemsize, save_pre=save_pre)
    costs = {config: cycles(config, m, n, k, itemsize, arch, count) for config in menu}
    work = {config: waves(config, m, n, count)[1] for config in menu}
    cheapest = min(menu, key=costs.__getitem__)
    if waves(cheapest, m, n, count)[0] <= 1:
        return cheapest
    good = [c for c in menu if work[c] <= _MORE_WORK * min(work.values()) and costs[c] <= _MORE_TIME * costs[cheapest]]
    return min(good, key=costs.__getitem__, default=cheapest)


def does_not_suit(config: GemmConfig, arch: str, stage: str, itemsize: int) -> str | None:
    """Why a configuration cannot run a stage on an architecture, or None."""
    amd = arch.startswith("gfx")
    threads = config.num_warps * (64 if amd else 32)
    if threads > 1024:
        return f"num_warps: {config} has {threads} threads, a program has at most 1024"
    registers = 512 if amd else 255
    tensor_memory = arch.startswith("sm_10")  # there it is not registers that hold the tile
    if config.rows * config.block_n > registers * threads and not tensor_memory:
        return f"the tile of {config} takes more than {registers} registers a thread"
    if config.split_k > 1 and amd:
        return f"split_k is for NVIDIA GPUs, got {config} for {arch}"
    if (config.form != "pointer" or config.pdl) and not has_tma(arch, itemsize):
        return f"form {config.form!r} (pdl {config.pdl}) is for 16 bit on Hopper and later, got {config} for {arch}"
    dense = stage in ("linear", "linear_merge")
    if (config.form == "swap_ab" and not dense) or (config.form == "tma" and not (dense or stage == "concat")):
        return f"stage {stage!r} has no form {config.form!r}, got {config}"
    need, limit = config.shared_bytes(itemsize), SHARED_MEMORY_LIMIT.get(arch)
    if limit is not None and need > limit:
        return f"{config} needs {need} bytes of shared memory, {arch} has {limit}"
    return None
