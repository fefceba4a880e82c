"""python -m stf_kernels.tune: search the configurations of the GPU at hand and write its table."""

import argparse
import time
from pathlib import Path

from ..command import run

# Written out for --help, which answers before torch is imported.
DTYPES = ("float16", "bfloat16", "float32")
TUNED = ("concat", "linear_merge", "linear", "merge", "linear_scatter", "concat_wgrad", "merge_wgrad")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stf_kernels.tune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="images")
    parser.add_argument("--problem", nargs="+", choices=TUNED, default=TUNED)
    parser.add_argument("--most", type=int, default=24, help="configurations to measure of each problem")
    parser.add_argument("--out", type=Path, help="default: the package's own table of this device")
    parser.add_argument("--again", action="store_true", help="measure what the table already has, too")
    parser.add_argument("--commit", default="unknown", help="the commit that is measured, for the record")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.most < 1:
        parser.error(f"--batch, --most: expected at least 1, got {options.batch}, {options.most}")
    import torch

    from ..backend import triton_serves
    from ..configs import device_identity
    from ..configs.tables import DTYPES as SIZES
    from ..configs.tables import multiprocessors, table_path
    from .candidates import candidates
    from .measure import measure
    from .problems import PROBLEMS
    from .search import TableFile, entry_for

    if not torch.cuda.is_available() or not triton_serves(torch.device("cuda", torch.cuda.current_device())):
        parser.error("this command measures, and there is no GPU here that Triton serves; the model serves without")

    import triton

    index = torch.cuda.current_device()
    slug, arch = device_identity(index)
    header = {"device": torch.cuda.get_device_name(index), "arch": arch, "commit": options.commit}
    header |= {"torch": torch.__version__, "triton": triton.__version__}
    table = TableFile(options.out or table_path(slug), header)
    for dtype in options.dtype:
        for problem in map(PROBLEMS.__getitem__, options.problem):
            for batch in filter(problem.has_choice, sorted(options.batch)):
                m = batch * problem.tokens
                if table.knows(problem, dtype, m) and not options.again:
                    continue
                began = time.monotonic()
                configs = candidates(problem, m, SIZES[dtype], arch, multiprocessors(index))[: options.most]
                entry = entry_for(problem, dtype, m, measure(problem, getattr(torch, dtype), batch, configs))
                table.add(entry)
                print(
                    f"{dtype:9} {problem.name:14} m {m:6}  {entry['provider']:6} {entry['us']:8.1f} us, "
                    f"{entry['rival']} {entry['rival_us']:8.1f} us  ({time.monotonic() - began:.0f} s)",
                    flush=True,
                )
    print(f"{len(table.entries)} entries in {options.out or table_path(slug)}")
    return 0


if __name__ == "__main__":
    run(main)
