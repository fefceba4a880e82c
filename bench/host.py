"""What the operators cost beside plain PyTorch: host time of an eager call, and a CPU's time and memory at real sizes.

host   Of tensors so small that what is left is the way to the launch, in processor time of one thread. On a GPU both
       sides run there. Without one ours are launched on a driver that only records (tests/launch), and the reference's
       operators compute on the CPU, a microsecond or two each in place of a launch.
cpu    The projector of LLaVA-1.5-7B in fp32 on one thread, forward and training step, where there is no GPU. In wall
       time, which is what a user waits; `cpu_ratio` is the ratio of the same calls' processor times.

Ours and the reference's take turns, A B B A: `us` is a median, `ratio` the median of reference_us / us turn by turn,
between its `min` and `max`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from . import command, results

NAME, ARCH, TURNS = "bench.host", "sm_90", 15
ROUNDS = {(1, False): 9, (1, True): 7, (8, False): 4, (8, True): 4}  # (batch, trains): turns
SIZES, TOKENS = (8, 1024, 4096), 577  # blocks, channels, width of the language model; tokens of a block
Pair = Sequence[Any]  # ours and the reference's


def cases(device: str) -> Iterator[tuple[str, bool, Pair]]:
    """What, whether it trains, ours and the reference's."""
    import torch

    import reference
    import stf_kernels

    from .kernels.problems import reference_projector

    blocks, grid = [torch.randn(1, 17, 16, device=device) for _ in range(8)], (4, 4)
    concat, merge = (torch.randn(16, width, device=device) for width in (128, 64))
    ours = stf_kernels.CompactTokenProjector(8, 16, 16, skip_tokens=1, device=device)
    theirs = reference_projector(ours)

    def pair(call: Callable[[Any, Any], Any]) -> Pair:
        return lambda: call(stf_kernels, ours), lambda: call(reference, theirs)

    skip: dict[str, Any] = {"skip_tokens": 1}
    yield "concat_linear", False, pair(lambda p, _: p.concat_linear(blocks, concat, activation="gelu", **skip))
    yield "spatial_merge_linear", False, pair(lambda p, _: p.spatial_merge_linear(blocks[0], merge, grid=grid, **skip))
    yield "chain", False, pair(lambda _, projector: projector(blocks))
    yield "chain forward+backward", True, pair(lambda _, projector: projector(blocks).sum().backward())


def row(what: str, turns: list[Pair]) -> dict[str, Any]:
    """Of seconds, turn by turn."""
    ours, theirs = (1e6 * median(times) for times in zip(*turns, strict=True))
    ratios = [other / own for own, other in turns]
    spread = {"ratio": median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"what": what, "us": ours, "reference_us": theirs, **spread}


def in_turns(time_of: Callable[[Any], Any], pair: Pair, turns: int) -> list[Pair]:
    """A B, B A, A B, ...: a machine that is busier for a while slows both."""
    found = []
    for turn in range(turns):
        order = 1 if turn % 2 == 0 else -1
        found.append(tuple([time_of(side) for side in pair[::order]][::order]))
    return found


def host_times(device: str) -> dict[str, Any]:
    """The rows, and in microseconds a stage whose launch is prepared beside the driver's own call."""
    import torch
    from torch.utils.benchmark import Timer

    def compared(what: str, pair: Pair, loops: int) -> dict[str, Any]:
        timers = [Timer("call()", globals={"call": call}, num_threads=1, timer=time.process_time) for call in pair]
        loops = loops or max(10, int(2e-3 / timers[0].timeit(20).median))
        return row(what, in_turns(lambda timer: timer.timeit(loops).median, timers, TURNS))

    found: dict[str, Any] = {"rows": []}
    for what, trains, pair in cases(device):
        with torch.set_grad_enabled(trains):
            found["rows"].append(compared(what, pair, 0))
    with torch.no_grad():
        if stage := repeated_stage(device):
            times = compared("stage", stage, 200)
            found["stage"] = {"us": times["us"], "driver_us": times["reference_us"]}
    return found


def repeated_stage(device: str) -> Pair | None:
    """A stage of eight blocks as a repeated call launches it, and the compiled kernel's own launch; None without."""
    import torch

    from stf_kernels.backend import resolve
    from stf_kernels.ops import launch
    from stf_kernels.ops.segments import Stage

    blocks = [torch.zeros(1, 17, 16, device=device)[:, 1:] for _ in range(8)]
    weight, y, stage = torch.zeros(16, 128, device=device), torch.zeros(1, 16, 16, device=device), Stage("gelu")
    launch._ready.clear()
    if resolve(weight.device, weight.dtype) != "torch":
        launch.run_stage(blocks, weight, None, stage, forced=True)
    if not launch._ready:
        return None
    # Whatever form the device would choose: the arguments below are those of a plain tile.
    config = next(iter(launch._ready.values())).config.portable()
    options = {"forced": True, "config": dataclasses.replace(config, split_k=1)}
    launch._ready.clear()
    launch.run_stage(blocks, weight, None, stage, **options)
    [ready] = launch._ready.values()
    tensors = tuple(blocks), weight, None, y, None, None, None, None

    def bare() -> None:
        ready.compiled[ready.grid](*tensors, *ready.sizes)

    return lambda: launch.run_stage(blocks, weight, None, stage, **options), bare


def recorded() -> dict[str, Any] | None:
    """`host_times` of a process whose CUDA driver records; None where there is no C compiler, or no Triton."""
    from tests.launch import recording_driver

    if recording_driver.COMPILER is None or not find_spec("triton"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        # Nothing can be timed there, so nothing is selected: the kernels of the model.
        ours = {"STF_KERNELS_SELECT": "off", "STF_KERNELS_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **recording_driver.build(Path(folder)), **ours}
        answer, code = Path(folder) / "host.json", "import sys; from bench import host; host.record(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(answer)], cwd=results.ROOT, env=environment, check=True)
        return json.loads(answer.read_text(encoding="utf-8"))


def record(path: str) -> None:
    """In that process; also how many launches a call of the chain is."""
    from tests.launch import recording_driver

    recorder = recording_driver.install(ARCH)
    found = host_times("cpu")
    recorder.take()
    {what: pair for what, _, pair in cases("cpu")}["chain"][0]()
    Path(path).write_text(json.dumps({**found, "launches": len(recorder.take())}), encoding="utf-8")


def keep_freed_memory() -> None:
    """Within the process, by glibc: else the operating system clears the pages of every step's gradients anew, from
    which most of a training step's spread comes."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def cpu_times() -> Iterator[dict[str, Any]]:
    """A row a batch, forward and training: gradients of the parameters, as the tower is frozen."""
    import torch

    import stf_kernels

    from .kernels.problems import reference_projector
    from .meters import MB, peak_bytes

    torch.set_num_threads(1)
    keep_freed_memory()
    ours = stf_kernels.CompactTokenProjector(*SIZES, skip_tokens=1)
    pair = ours, reference_projector(ours)

    def seconds(projector: Any) -> tuple[float, float]:
        """Of the wall's clock and of the processor's, of one call."""
        began = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(trains):
            y = projector(blocks)
            if trains:
                y.sum().backward()
        taken = time.perf_counter() - began[0], time.process_time() - began[1]
        projector.zero_grad()
        return taken

    for (batch, trains), turns in ROUNDS.items():
        blocks = [torch.randn(batch, TOKENS, SIZES[1]) for _ in range(SIZES[0])]
        peaks = []
        for side in pair:
            peaks.append(peak_bytes(lambda side=side: seconds(side), "cpu")[1] / MB)
            seconds(side)  # warms up
        what = f"projector {'training step' if trains else 'forward'}, batch {batch}"
        times = in_turns(seconds, pair, turns)
        wall, processor = ([(ours[clock], theirs[clock]) for ours, theirs in times] for clock in (0, 1))
        found = {**row(what, wall), "cpu_ratio": row(what, processor)["ratio"]}
        yield {**found, "peak_mb": peaks[0], "reference_peak_mb": peaks[1]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Host time of an eager call; a CPU's time.")
    parser.add_argument("--json", type=command.writable_file, metavar="FILE", help="default: .work/results/<device>/")
    parser.add_argument("--only", choices=("host", "cpu"), help="default: both, or on a GPU the first")
    args = parser.parse_args(argv)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.json or results.results_folder(device) / "host.json"
    result = {**results.describe("host", device), "driver": "the GPU's", "rows": [], "cpu": []}
    if args.only != "cpu" and device == "cuda":
        result |= host_times(device)
    elif args.only != "cpu":
        found = recorded()
        result |= found or host_times(device)
        result["driver"] = f"recording, {ARCH}; the reference on the CPU" if found else "none: both in plain torch"
        print(f"host: {result['driver']}", file=sys.stderr)
    if args.only == "cpu" or (args.only is None and device == "cpu"):
        for found in cpu_times():
            result["cpu"].append(found)
            print(f"{found['what']}: {found['ratio']:.3f}", file=sys.stderr, flush=True)
            results.write(path, result)
    results.write(path, {**result, "complete": True})
    print(result["device"], *tables(result), path, sep="\n\n")
    return 0


def tables(result: dict[str, Any]) -> Iterator[str]:
    heads = {"us": "us", "reference_us": "reference us", "ratio": "reference / ours", "min": "min", "max": "max"}
    memory = {"cpu_ratio": "of CPU time", "peak_mb": "MB", "reference_peak_mb": "reference MB"}

    def cells(what: str, rows: list[dict[str, Any]], titles: dict[str, str]) -> list[dict[str, str]]:
        return [{what: one["what"], **{title: f"{one[key]:.2f}" for key, title in titles.items()}} for one in rows]

    if result["rows"]:
        yield f"Driver: {result['driver']}\n\n" + command.table(cells("host time", result["rows"], heads))
    if "stage" in result:
        said = "A stage that is launched again: {us:.1f} us, of which the driver's call {driver_us:.1f}"
        yield said.format(**result["stage"])
    if result["cpu"]:
        yield command.table(cells("CPU, wall time", result["cpu"], heads | memory))


if __name__ == "__main__":
    command.run(main)
