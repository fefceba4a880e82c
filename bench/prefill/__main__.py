"""The main job: LLaVA-1.5 at 576 image tokens against LLaVA-STF at 144, stage by stage, from a photograph.

`--family`: LLaVA-NeXT or LLaVA-OneVision instead, at the tiles that the photograph is cut into.

How it measures is in bench/METHOD.md. Exit codes: 0 measured, 1 outputs that should agree do not (no speed-up is
printed) or a row ended in an error, 2 bad input, 130 interrupted (the file keeps what was measured, as incomplete).
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from .. import command
from .presets import FAMILIES, points, preset, preset_of

PHOTOGRAPH = Path(__file__).parent.parent / "assets" / "raccoon.jpg"
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # for torch's CPU tensors; see METHOD.md


def photograph(text: str) -> Any:
    """A decoded RGB image: a file that is no image, or half of one, is found now and not after the model is built."""
    from PIL import Image

    try:
        with Image.open(text) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read as an image ({error})") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prefill", description="LLaVA-1.5 against LLaVA-STF, by stages."
    )
    add, many = parser.add_argument, {"type": command.positive(int), "nargs": "+", "metavar": "N"}
    presets = {name: list(family["presets"]) for name, family in FAMILIES.items()}
    add("--preset", choices=presets["llava-1.5"], help="default: 7b with a GPU, else cpu: 2 of its layers; tiny: a toy")
    add("--family", choices=list(FAMILIES), default="llava-1.5", help="default: llava-1.5")
    add("--model", type=command.model_folder, metavar="FOLDER", help="a LLaVA-1.5 checkpoint instead of a preset")
    add("--image", type=photograph, default=str(PHOTOGRAPH), metavar="FILE", help="default: one in bench/assets")
    add("--batch", help="batch sizes", **many)
    add("--text", help="text tokens around the images", **many)
    add("--images", help="images, or frames, of a sequence", **many)
    add("--json", type=command.writable_file, metavar="FILE", help="default: into .work/results/, with a page")
    add("--full", action="store_true", help="every row and column, and on a GPU all modes")
    add("--modes", nargs="+", choices=("eager", "graph", "compile"), help="default: eager; on a GPU also graph")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, but for the preset cpu")
    add("--rounds", type=command.positive(int), metavar="N", help="exactly N rounds instead of as many as fit")
    add("--budget", type=command.positive(float), metavar="SECONDS", help="no round begins that would end later")
    args = parser.parse_args(argv)
    if args.model and args.preset:
        parser.error("argument --model: give either --model or --preset, not both")
    given = [name for name in ("model", "images", "full") if getattr(args, name)]
    if args.family != "llava-1.5" and (given or args.preset not in (None, *presets[args.family])):
        known = f"expected a preset of {presets[args.family]} and none of --model, --images, --full"
        parser.error(f"argument --family: {args.family}: {known}, got {given or args.preset!r}")
    return args


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse(argv)
    os.environ.setdefault(HUGE_PAGES, "1")  # torch reads it when it is imported
    print("importing torch and transformers", file=sys.stderr)
    import torch

    from ..meters import shortage

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise command.BadInput("--device: 'cuda' was asked for and torch sees no GPU; use --device cpu")
    default = "7b" if has_gpu and args.device != "cpu" else "cpu"
    size = args.image.size[::-1]
    args.preset = preset_of(args.model) if args.model else preset(args.preset or default, args.family, size)
    device = args.device or ("cuda" if has_gpu and args.preset.name != "cpu" else "cpu")
    if "graph" in (args.modes or ()) and device == "cpu":
        raise command.BadInput("--modes: 'graph' needs a GPU; on a CPU use eager or compile")
    item, wanted = 2 if device == "cuda" else 4, points(args, args.preset)
    need, smallest = min((args.preset.activation_bytes(point, item), point) for point in wanted)
    if short := shortage(need + args.preset.weight_bytes(item), device):
        what = f"{'--model' if args.model else '--preset'}: {args.preset.name!r} at batch {smallest.batch}"
        advice = f"does not fit on {device}, {short}; use a smaller preset or a larger device"
        raise command.BadInput(f"{what} {advice}")
    return measure(args, device, began)


def measure(args: argparse.Namespace, device: str, began: float) -> int:
    """Run, write the file and the page, print the table -> exit code."""
    from .. import results
    from .run import BROKEN, Run
    from .table import report

    gpu = device == "cuda"
    args.modes = args.modes or (["eager", "graph", *["compile"] * args.full] if gpu else ["eager"])
    # On a CPU torch.compile builds C++ for every layer of tower and language model: a minute a row, even of a toy.
    patience = 420.0 if gpu else 600.0 if "compile" in args.modes else 300.0 if args.full or args.preset.size else 100.0
    name = "prefill" if args.family == "llava-1.5" else f"prefill-{args.family}"
    path = args.json or results.results_folder(device) / f"{'tiny' if args.preset.name == 'tiny' else name}.json"
    run = Run(args, device, began + (args.budget or patience), path, {HUGE_PAGES: os.environ.get(HUGE_PAGES)})
    run.measure()
    print(f"\n{report(run.result, full=args.full)}\n\n{path}   ({time.monotonic() - began:.0f} s)")
    if args.json is None:
        from ..report.page import write_report

        print(*filter(None, write_report([path], path.parent)), sep="\n")
    # torch.compile is a mode where it works.
    broken = any(BROKEN in (row["failed"] or "") and row["mode"] != "compile" for row in run.result["rows"])
    return int(bool(run.result["refused"]) or broken)


if __name__ == "__main__":
    command.run(main)
