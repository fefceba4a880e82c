"""The configuration when no table matches.

Rule: the largest tile that still gives every multiprocessor one (about a hundred tiles), within the shared memory
and the register file of the architecture. It is a default that fits everywhere, not a measurement.
"""

from dataclasses import replace

from .config import GemmConfig

# Bytes of shared memory that one program may take, by architecture.
SHARED_MEMORY_LIMIT = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}

_MANY_TILES = 96  # roughly the multiprocessors of a data-centre GPU

# Tiles of a family (see _family), from large to small: the first is left out where an epilogue would make it spill.
# 16-bit operands; fp32 below.
_HALF = {
    # 227 KB of shared memory, warpgroup products: wide tiles, 64 columns a step
    "sm_90": (GemmConfig(128, 256, 64, 8, 8, 3), GemmConfig(128, 128, 64, 8, 8, 4), GemmConfig(64, 128, 64, 8, 4, 4)),
    # 163 KB of shared memory
    "sm_80": (GemmConfig(128, 256, 32, 8, 8, 4), GemmConfig(128, 128, 32, 8, 8, 4), GemmConfig(64, 128, 64, 8, 4, 4)),
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
_FLOAT = (GemmConfig(128, 64, 32, 8, 8, 3), GemmConfig(64, 64, 16, 8, 4, 3))
_FLOAT_AMD = (GemmConfig(128, 64, 16, 8, 8, 2), GemmConfig(64, 64, 16, 8, 4, 2), GemmConfig(32, 64, 16, 8, 4, 2))


def _family(arch: str) -> str:
    """The family whose tiles suit an architecture; unknown ones get the tiles that fit the smallest shared memory."""
    if arch.startswith("gfx"):
        return "gfx942"
    return {"sm_90": "sm_90", "sm_100": "sm_90", "sm_103": "sm_90", "sm_80": "sm_80"}.get(arch, "sm_89")


def tiles(arch: str, itemsize: int, *, save_pre: bool = False) -> tuple[GemmConfig, ...]:
    """The heuristic's configurations for an architecture ("sm_90", "gfx942", ...), largest tile first.

    save_pre: for an epilogue that stores the pre-activation too. With the largest tile it spills.
    """
    if save_pre:
        return tiles(arch, itemsize)[1:]
    if itemsize == 4:
        return _FLOAT_AMD if arch.startswith("gfx") else _FLOAT
    return _HALF[_family(arch)]


def wgrad_tiles(arch: str, itemsize: int) -> tuple[GemmConfig, ...]:
    """Tiles of the weight gradient's kernel, largest first; on sm_120 the family's largest spills."""
    found = tiles(arch, itemsize)
    return found[1:] if itemsize == 4 or _family(arch) == "sm_89" else found


def split_tiles(arch: str, itemsize: int) -> list[GemmConfig]:
    """The smaller tiles with K split, for the tuner to try at few rows: never run on hardware, so no default."""
    if arch.startswith("gfx"):
        return []  # kernels/split_k.py says why
    return [replace(config, split_k=splits) for config in tiles(arch, itemsize)[1:] for splits in (2, 4, 8)]


def tma_tiles(arch: str, itemsize: int) -> list[GemmConfig]:
    """Tiles fetched by TMA, for the tuner to try: never run on hardware, so no default."""
    return [*_TMA] if has_tma(arch, itemsize) else []


def swap_ab_tiles(arch: str, itemsize: int) -> list[GemmConfig]:
    """The swapped form for M = 144 and its multiples, whole and with K split: likewise no default."""
    return [*_SWAP_AB] if has_tma(arch, itemsize) else []


def has_tma(arch: str, itemsize: int) -> bool:
    """Where TMA feeds warpgroup products or their successors: data-centre GPUs from Hopper on, 16-bit operands."""
    return itemsize == 2 and _family(arch) == "sm_90"


def default_config(arch: str, itemsize: int, m: int, n: int, *, save_pre: bool = False) -> GemmConfig:
    """A configuration for y [m, n] on an architecture, operands of `itemsize` bytes."""
    return _largest_that_fills(tiles(arch, itemsize, save_pre=save_pre), m, n)


def _largest_that_fills(candidates: tuple[GemmConfig, ...], m: int, n: int) -> GemmConfig:
    for config in candidates:
        if -(-m // config.block_m) * -(-n // config.block_n) >= _MANY_TILES:
            return config
    return candidates[-1]


def default_wgrad_config(arch: str, itemsize: int, n: int, k: int) -> GemmConfig:
    """A configuration for dW [n, k]."""
    return _largest_that_fills(wgrad_tiles(arch, itemsize), n, k)


def smallest(itemsize: int) -> GemmConfig:
    """A configuration that fits every GPU: 16 KB of shared memory, one warpgroup."""
    return GemmConfig(32, 32, 32, 8, 4, 2) if itemsize == 2 else GemmConfig(32, 32, 16, 8, 4, 2)
