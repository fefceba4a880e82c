"""The K axis of a GEMM shared out among programs: for few rows, whose tiles alone do not fill the GPU.

    program (tile, split) sums its part of the K steps and writes it to a workspace;
    the last of a tile's programs to arrive adds the parts up in the order of the splits, and stores the tile.

NVIDIA only: there the barrier and the releasing atomic of one thread publish the stores of all. AMD's barrier does not
wait for the stores of other wavefronts, so a part might be read before it is written; configurations refuse it there.

No atomic ever adds a value, so the sum has one order and a run the same bits as the run before.
"""

import triton
import triton.language as tl


@triton.jit
def _parts_of_tile(workspace_ptr, tile, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   ROOM: tl.constexpr):  # fmt: skip
    """Addresses of a tile's first part, [ROWS, COLUMNS]; the next one is ROOM elements on."""
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return workspace_ptr + tile.to(tl.int64) * (SPLIT_K * ROOM) + within


@triton.jit
def publish_part(acc, workspace_ptr, tile, split, SPLIT_K: tl.constexpr, ROOM: tl.constexpr):
    """Write one program's part of a tile, fp32, into its place of the workspace."""
    parts = _parts_of_tile(workspace_ptr, tile, SPLIT_K, acc.shape[0], acc.shape[1], ROOM)
    tl.store(parts + split * ROOM, acc)


@triton.jit
def is_last_to_arrive(arrived_ptr, SPLIT_K: tl.constexpr):
    """Whether all other programs of the tile have published their parts; the last one finds the counter full."""
    # Every thread's part must be written before one thread announces the arrival of all.
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == SPLIT_K - 1


@triton.jit
def sum_of_parts(workspace_ptr, tile, SPLIT_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 ROOM: tl.constexpr):  # fmt: skip
    """The tile: its parts added in the order of the splits, whoever came first."""
    parts = _parts_of_tile(workspace_ptr, tile, SPLIT_K, ROWS, COLUMNS, ROOM)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for s in range(SPLIT_K):
        # .cg: from L2, where the other programs' parts are
        total += tl.load(parts + s * ROOM, cache_modifier=".cg")
    return total
