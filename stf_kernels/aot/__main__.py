"""python -m stf_kernels.aot: compile every shipped configuration for GPUs that are not here, and check the code."""

import argparse
import os
import time
from pathlib import Path

from ..command import run, shielded

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stf_kernels.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=ARCHS, default=ARCHS, metavar="ARCH", help=" ".join(ARCHS))
    parser.add_argument("--defaults", action="store_true", help="only what serves when no table matches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was read of every case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from ..backend import has_triton
    from ..configs.tables import write_json
    from .cases import cases, examine

    if not has_triton():
        parser.error("triton is not installed, which compiles the kernels: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    todo = [case for arch in options.target for case in cases(arch, defaults_only=options.defaults)]
    broken, records, began = 0, [], time.monotonic()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        with shielded():
            futures = [pool.submit(examine, case) for case in todo]
        for done, future in enumerate(as_completed(futures), 1):
            line, found, record = future.result()
            violations = "".join(f"\n    VIOLATION: {violation}" for violation in found)
            minutes = (time.monotonic() - began) / 60 * (len(todo) / done - 1)
            print(f"[{done:{len(str(len(todo)))}}/{len(todo)}, {minutes:2.0f} min left] {line}{violations}", flush=True)
            broken += bool(found)
            records += [record] if record else []
    if options.json:
        import triton

        write_json(options.json, {"triton": triton.__version__, "cases": records})
    print(f"{len(todo)} cases, {', '.join(options.target)}: {broken} with violations")
    return 1 if broken else 0


if __name__ == "__main__":
    run(main)
