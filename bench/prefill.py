"""The main job: LLaVA-1.5 at 576 image tokens against LLaVA-STF at 144, stage by stage, from a photograph.

    python -m bench.prefill [--preset cpu|7b|13b | --model FOLDER] [--image FILE]
                            [--batch N ...] [--text N ...] [--images N ...] [--sweep]
                            [--json FILE] [--report DIR] [--full] [--modes eager graph compile] [--decode N]

Several values of one option are measured with every value of the others. `--sweep` changes one at a time instead,
around the first values: batch 1 to 32, 64 to 1024 text tokens, 1 to 16 images (frames) of a sequence.

How it measures is in METHOD.md. Exit codes: 0 measured, 1 outputs that should agree do not (no speed-up is printed) or
a row ended in an error, 2 bad input, 130 interrupted (the file keeps what was measured and says `"complete": false`).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import entry
from .arguments import llava_folder, photograph, positive_float, positive_int, writable_file, writable_folder
from .points import Point, memory_problem, point_problem, points
from .presets import PRESETS, Preset

PHOTOGRAPH = Path(__file__).parent / "assets" / "rocket.jpg"
SEED = 0
FLAGS = {"THP_MEM_ALLOC_ENABLE": "1"}  # huge pages for torch's CPU tensors; see METHOD.md
NOISY = ("torchao", "torch.utils._pytree")  # transformers imports torchao where it is, which warns of what it lacks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prefill", description="Compare LLaVA-1.5 with LLaVA-STF, stage by stage."
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="sizes; default: 7b with a GPU, cpu without")
    parser.add_argument(
        "--model", type=llava_folder, metavar="FOLDER", help="a LLaVA-1.5 checkpoint instead of a preset"
    )
    parser.add_argument("--image", type=photograph, metavar="FILE", help="default: the photograph in bench/assets")
    parser.add_argument("--batch", type=positive_int, nargs="+", metavar="N", help="batch sizes")
    parser.add_argument("--text", type=positive_int, nargs="+", metavar="N", help="text tokens around the images")
    parser.add_argument("--images", type=positive_int, nargs="+", metavar="N", help="images, or frames, of a sequence")
    parser.add_argument("--sweep", action="store_true", help="one of the three at a time over a range")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="default: .work/results/<device>/")
    parser.add_argument(
        "--report", type=writable_folder, metavar="DIR", help="also report.html and charts (default run)"
    )
    parser.add_argument("--full", action="store_true", help="all six rows, decoding, and on a GPU all modes")
    parser.add_argument("--modes", nargs="+", choices=("eager", "graph", "compile"), help="eager; on a GPU also graph")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--decode", type=positive_int, metavar="N", help="also decode N tokens per round")
    parser.add_argument("--rounds", type=positive_int, metavar="N", help="exactly N rounds instead of as many as fit")
    parser.add_argument("--budget", type=positive_float, metavar="SECONDS", help="no round begins that would end later")
    args = parser.parse_args(argv)
    if args.model and args.preset:
        parser.error("argument --model: give either --model or --preset, not both")
    if args.image is None:
        args.image = photograph(str(PHOTOGRAPH))
    return args


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse(argv)
    for name, value in FLAGS.items():
        os.environ.setdefault(name, value)  # torch reads them when it is imported
    import torch

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from .models import CheckpointError, preset_of

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        return _bad_input("--device: 'cuda' was asked for and torch sees no GPU; use --device cpu")
    if args.model:
        try:
            args.preset = preset_of(args.model)
        except CheckpointError as error:
            return _bad_input(f"--model: {error}")
    else:
        args.preset = PRESETS[args.preset or ("7b" if has_gpu and args.device != "cpu" else "cpu")]
    device = args.device if args.device != "auto" else "cuda" if has_gpu and args.preset.name != "cpu" else "cpu"
    if "graph" in (args.modes or ()) and device == "cpu":
        return _bad_input("--modes: 'graph' needs a GPU; on a CPU use eager or compile")
    if problem := memory_problem(args.preset, points(args), device, "--model" if args.model else "--preset"):
        return _bad_input(problem)

    from . import environment, results
    from .group import is_broken
    from .terminal import report

    path = args.json or environment.results_folder(device) / "prefill.json"
    print(f"{args.preset.name} on {environment.device_name(device)}", file=sys.stderr)
    result: dict[str, Any] = {}

    def save() -> None:
        results.check(result, str(path))
        results.write(path, result)

    try:
        run(args, device, began, result, save)
    except KeyboardInterrupt:
        if result:
            save()
            print(f"\ninterrupted; {path} keeps what was measured", file=sys.stderr)
        return 130
    except CheckpointError as error:
        return _bad_input(f"--model: {error}")
    save()
    written, note = [path], None
    if args.report or args.json is None:
        from .report import write_report

        page, note = write_report([path], args.report or path.parent)
        written.append(page)
    print(report(result))
    if note:
        print(f"\n{note}")
    print(f"\n{'  '.join(map(str, written))}   ({time.monotonic() - began:.0f} s)")
    return 1 if result["refused"] or any(map(is_broken, result["rows"])) else 0


def _bad_input(message: str) -> int:
    print(f"python -m bench.prefill: error: {message}", file=sys.stderr)
    return 2


def run(
    args: argparse.Namespace, device: str, began: float, result: dict[str, Any], save: Callable[[], None]
) -> dict[str, Any]:
    """Measure into `result`, calling `save` after every round."""
    import torch

    from . import environment, models
    from .group import Group, take_rounds
    from .plain import SAVINGS
    from .progress import Progress
    from .roofline import beaten, measure_ceilings

    preset: Preset = args.preset
    gpu = device == "cuda"
    item = 2 if gpu else 4
    dtype = torch.bfloat16 if gpu else torch.float32
    wanted = points(args)
    modes = args.modes or (["eager", "graph", *(["compile"] if args.full else [])] if gpu else ["eager"])
    decode = args.decode or (8 if args.full else 0)
    fewest, most = (args.rounds, args.rounds) if args.rounds else (2, 20 if gpu else 6)
    # On a CPU torch.compile builds C++ for every layer of tower and language model: a minute a row, even of a toy.
    patience = 420.0 if gpu else 600.0 if "compile" in modes else 300.0 if args.full else 100.0
    until = began + (args.budget or patience)
    plan = [(mode, point) for point in wanted for mode in modes]
    result |= {
        "schema": 1, "kind": "prefill", "complete": False, **environment.describe(device),
        "dtype": str(dtype).removeprefix("torch."), "preset": preset.name, "attention": "sdpa", "seed": SEED,
        "weights": f"{args.model.name}, LLaVA-STF's projector random" if args.model else "random",
        "output_tokens": 1, "decode_tokens": decode,
        "command": ["python", "-m", "bench.prefill", *sys.argv[1:]],
        "flags": {
            **{name: os.environ.get(name) for name in FLAGS},
            "threads": torch.get_num_threads(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        "peak_mb_means": "the row's own weights + the peak of what one prefill allocates (bench/memory.py)",
        "total_ms_means": "pixel values on the device to the first token on the host; preprocess_ms is not in it",
        "savings_mean": SAVINGS, "clocks_mhz": [],
        "checks": [], "rows": [], "comparisons": [], "speedup": {}, "targets": [], "refused": None, "notes": [],
    }  # fmt: skip
    rows_per_group = 6 if args.full else 3
    with Progress(2 + len(plan) * (rows_per_group + most)) as bar, torch.no_grad():
        bar.now("measuring the ceilings of this device")
        ceilings = measure_ceilings(device, dtype)
        result["ceilings"] = ceilings.as_dict()
        bar.now(f"building LLaVA-1.5 ({preset.name}), weights: {result['weights']}")
        if args.model:
            stock = models.load_stock(args.model, device=device, dtype=dtype)
        else:
            stock = models.build_stock(preset, device=device, dtype=dtype, seed=SEED)
        rows = models.build_rows(stock, preset, full=args.full)
        bar.step()

        bar.now("image features of the warm start, to be checked against the pooled stock model's")
        process = models.image_processor(preset)
        smallest = min(wanted, key=lambda point: (point[0] * point[2], point[1]))
        first = _inputs(args, preset, device, dtype, smallest)
        warm, checks = image_features(rows[-1], first), []
        # From here on dense random weights: the warm start's zeros could run faster than a trained projector.
        models.randomise(rows[-1].activate().model.multi_modal_projector, SEED + 1)
        bar.step()

        eager_outputs: dict[Point, dict[str, Any]] = {}
        groups: list[Group] = []

        def publish() -> None:
            result["checks"] = [check.as_dict() for check in checks]
            for group in groups:
                result["checks"] += [check.as_dict() for check in group.checks]
            result["rows"] = [with_floor(cell.as_dict(), preset, ceilings, item) for g in groups for cell in g.cells]
            conclude(result)
            save()

        warm_up = 0.0  # the longest so far, in seconds
        for index, (mode, point) in enumerate(plan):
            batch, text, images = point
            name = f"{mode}, batch {batch}, {text} text tokens, {images} image{'s' if images > 1 else ''}"
            start = time.monotonic()
            if groups and start + warm_up > until:
                result["notes"].append(f"{name}: not measured, the time budget ended before")
                continue

            def preprocess(count: int = batch * images) -> float:
                start = time.perf_counter()
                process(args.image, count)
                return 1e3 * (time.perf_counter() - start)

            group = Group(
                rows, batch=batch, text_tokens=text, images=images, mode=mode, device=device, warmup=2 if gpu else 0,
                inputs=_inputs(args, preset, device, dtype, point), preprocess=preprocess, decode_tokens=decode,
                too_large=point_problem(preset, point, device),
            )  # fmt: skip
            groups.append(group)
            for cell in group.cells:
                bar.now(f"{name}: warm-up of {cell.row.name}")
                if mode == "compile" and time.monotonic() > until:
                    cell.failed = cell.failed or "not compiled, the time budget ended before"
                group.warm_up(cell)
                bar.step()
            if not checks:
                stock_output = group.cells[0].output if point == smallest else None
                known = None if stock_output is None else stock_output.features
                # In most runs the stock model has just encoded the same photographs: a pass of the tower saved.
                features = image_features(rows[0], first) if known is None else known.unflatten(0, (len(warm), -1))
                checks.append(check_warm_start(warm, features, preset))
            group.check(eager_outputs.get(point, {}))
            if mode == "eager":
                eager_outputs[point] = {c.row.name: c.output for c in group.cells if c.output is not None}
            publish()

            warm_up = max(warm_up, time.monotonic() - start)
            later = len(plan) - index - 1
            share = (until - time.monotonic() - later * warm_up) / (later + 1)

            def after_round(name: str = name, group: Group = group) -> None:
                nonlocal ceilings
                bar.step()
                if not gpu:  # others use a CPU too, and a ceiling is what it does when they do not
                    ceilings = ceilings.raised(measure_ceilings(device, dtype))
                    result["ceilings"] = ceilings.as_dict()
                bar.now(f"{name}: round {len(next(iter(group.cells)).samples) + 1}")
                publish()

            bar.now(f"{name}: round 1")
            taken = take_rounds(group, fewest=fewest, most=most, until=time.monotonic() + share, after_each=after_round)
            if gpu:  # right behind the work: before it, a GPU idles at a clock of its own
                result["clocks_mhz"].append(environment.clock_mhz())
            if taken < most and group.measurable:
                result["notes"].append(f"{name}: {taken} rounds fitted into the time budget, {most} were planned")
            group.release()
        bar.finish("done")
    if low := beaten(result["rows"]):
        result["notes"].append(low)
    result["complete"] = len(groups) == len(plan)
    conclude(result)
    return result


def _inputs(args: argparse.Namespace, preset: Preset, device: str, dtype: Any, point: Point) -> Callable:
    from . import models

    batch, text, images = point
    made: dict[int, Any] = {}

    def inputs(row: Any) -> Any:
        """Rows of one prompt length share one set of tensors."""
        if row.image_tokens not in made:
            made[row.image_tokens] = models.build_inputs(
                preset, args.image, batch=batch, text_tokens=text, image_tokens=row.image_tokens, images=images,
                device=device, dtype=dtype, seed=SEED,
            )  # fmt: skip
        return made[row.image_tokens]

    return inputs


def image_features(row: Any, inputs: Callable) -> Any:
    """[images, image tokens, D], from the photograph through the row's own tower and projector."""
    import torch

    encoded = row.activate().model.get_image_features(pixel_values=inputs(row).pixel_values)
    return torch.stack(list(encoded.pooler_output))


def check_warm_start(warm: Any, stock: Any, preset: Preset) -> Any:
    """LLaVA-STF fresh from `from_llava` against the stock model's image features, averaged 2x2."""
    from . import agreement
    from .models import pool_tokens

    name = "warm start against the pooled stock projector"
    return agreement.compare(name, warm, pool_tokens(stock, preset.grid), agreement.FEATURES)


def with_floor(row: dict[str, Any], preset: Preset, ceilings: Any, item: int) -> dict[str, Any]:
    """The row with the floor of each stage, and the ratio of what was measured to it."""
    from .roofline import floors_ms, prefill_work

    layers = preset.vision_layers - ("unused-tower-layers" in row["savings"])
    work = prefill_work(preset, model=row["model"], batch=row["batch"], text_tokens=row["text_tokens"], item=item,
                        images=row["images"], layers=layers)  # fmt: skip
    floors = floors_ms(ceilings, work)
    ratios = {stage: row[stage] / floor if row[stage] is not None else None for stage, floor in floors.items()}
    return {**row, "floor_ms": floors, "floor_ratio": ratios}


def conclude(result: dict[str, Any]) -> None:
    """Speed-ups from the rows measured so far, or the reason why there are none."""
    from .speedup import compare_rows, refusal, speedup_field
    from .targets import targets

    result["refused"] = refusal(result["checks"])
    result["comparisons"] = [] if result["refused"] else compare_rows(result["rows"])
    result["speedup"] = speedup_field(result["comparisons"])
    result["targets"] = targets(result)


if __name__ == "__main__":
    entry.run(main)
