"""Host time of an eager call, ours against the reference module's: what the operators and the dispatch add.

The tensors are so small that what is left is Python. Each pair is timed in turns, by torch.utils.benchmark on one
thread: `us` is the median of the turns, `ratio` that of reference_us / us.
"""

import argparse
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from . import command

NAME = "bench.host"


def cases(device: str) -> Iterator[tuple[str, bool, tuple[Callable[[], Any], ...]]]:
    """What, whether it trains, ours and the reference's."""
    import torch

    import reference
    import stf_kernels

    blocks, grid = [torch.randn(1, 16, 16, device=device) for _ in range(8)], (4, 4)
    concat, merge = (torch.randn(16, width, device=device) for width in (128, 64))
    ours, theirs = (p.CompactTokenProjector(8, 16, 16, device=device) for p in (stf_kernels, reference))
    theirs.load_state_dict(ours.state_dict())

    def pair(call: Callable[[Any, Any], Any]) -> tuple[Callable[[], Any], ...]:
        return lambda: call(stf_kernels, ours), lambda: call(reference, theirs)

    yield "concat_linear", False, pair(lambda package, _: package.concat_linear(blocks, concat, activation="gelu"))
    yield "spatial_merge_linear", False, pair(lambda p, _: p.spatial_merge_linear(blocks[0], merge, grid=grid))
    yield "chain", False, pair(lambda _, projector: projector(blocks))
    yield "chain forward+backward", True, pair(lambda _, projector: projector(blocks).sum().backward())


def measure(device: str, turns: int = 15) -> list[dict[str, Any]]:
    """In turns, so that a machine that is busier for a while slows both."""
    import torch
    from torch.utils.benchmark import Timer

    rows = []
    for what, trains, pair in cases(device):
        with torch.set_grad_enabled(trains):
            timers = [Timer("call()", globals={"call": call}, num_threads=1) for call in pair]
            loops = max(10, int(2e-3 / timers[0].timeit(20).median))
            samples = [[1e6 * timer.timeit(loops).median for timer in timers] for _ in range(turns)]
        ours, theirs = map(median, zip(*samples, strict=True))
        ratio = median(reference / own for own, reference in samples)
        rows.append({"what": what, "us": ours, "reference_us": theirs, "ratio": ratio})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Host time of an eager call.")
    parser.add_argument("--json", type=command.writable_file, metavar="FILE", help="default: .work/results/<device>/")
    args = parser.parse_args(argv)
    import torch

    from . import results

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {**results.describe("host", device), "rows": measure(device), "complete": True}
    results.write(path := args.json or results.results_folder(device) / "host.json", result)
    shown = [[r["what"], *(f"{r[name]:.2f}" for name in ("us", "reference_us", "ratio"))] for r in result["rows"]]
    heads = "host time", "us", "reference us", "reference / ours"
    print(result["device"], command.table(heads, shown), path, sep="\n\n")
    return 0


if __name__ == "__main__":
    command.run(main)
