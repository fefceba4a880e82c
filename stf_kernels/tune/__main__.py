"""python -m stf_kernels.tune: search the configurations of the GPU at hand and write its table."""

import argparse
import sys
import time
from pathlib import Path

import torch

from ..backend import triton_serves
from ..configs import device_identity
from ..configs.tables import DTYPES, table_path
from .candidates import candidates, forms_for
from .measure import ProblemBench
from .problems import PROBLEMS
from .search import Journal, Key, entries_of, entry_for, with_entry, write_table

_TUNED = ("concat", "linear_merge", "linear", "merge", "linear_scatter", "concat_wgrad", "merge_wgrad")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stf_kernels.tune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="images")
    parser.add_argument("--problem", nargs="+", choices=_TUNED, default=list(_TUNED))
    parser.add_argument("--most", type=int, default=24, help="configurations to measure of each problem")
    parser.add_argument("--out", type=Path, help="default: the package's own table of this device")
    parser.add_argument("--journal", type=Path, help="measurements so far; default: .work/tune-<device>.jsonl")
    parser.add_argument("--commit", default="unknown", help="the commit that is measured, for the record")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.most < 1:
        parser.error(f"--batch, --most: expected at least 1, got {options.batch}, {options.most}")
    if not torch.cuda.is_available() or not triton_serves(torch.device("cuda", torch.cuda.current_device())):
        parser.error("this command measures, and there is no GPU here that Triton serves; the model serves without")

    import triton

    slug, arch = device_identity(torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    header = {
        "device": properties.name, "arch": arch, "commit": options.commit,
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    limit = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    out = options.out or table_path(slug)
    try:
        journal = Journal(options.journal or Path(".work", f"tune-{slug}.jsonl"), header)
    except ValueError as error:
        parser.error(str(error))
    entries = entries_of(out, header)
    for dtype in options.dtype:
        for name in options.problem:
            problem = PROBLEMS[name]
            for batch in filter(problem.has_choice, sorted(options.batch)):
                began = time.monotonic()
                key = Key(name, dtype, batch * problem.tokens)
                bench = ProblemBench(problem, getattr(torch, dtype), batch)
                configs = candidates(
                    *problem.product(key.m), DTYPES[dtype],
                    shared_limit=limit, multiprocessors=properties.multi_processor_count,
                    splits=(1,) if problem.wgrad or arch.startswith("gfx") else (1, 2, 4, 8),
                    forms=forms_for(problem, arch, DTYPES[dtype]),
                )[: options.most]  # fmt: skip
                bench.compile([config for config in configs if not journal.knows(key, config)])
                entry = entry_for(problem, key, configs, bench.microseconds, journal)
                entries = with_entry(entries, entry)
                write_table(out, header, entries)
                print(
                    f"{dtype:9} {name:14} m {key.m:6}  {entry['provider']:6} {entry['us']:8.1f} us, "
                    f"{entry['rival']} {entry['rival_us']:8.1f} us  ({time.monotonic() - began:.0f} s)",
                    flush=True,
                )
    print(f"{len(entries)} entries in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
