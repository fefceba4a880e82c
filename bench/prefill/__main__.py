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
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from .. import command
from ..command import positive_float, positive_int
from .presets import SIZES, CheckpointError, memory_problem, points, preset, preset_of

PHOTOGRAPH = Path(__file__).parent.parent / "assets" / "rocket.jpg"
FLAGS = {"THP_MEM_ALLOC_ENABLE": "1"}  # huge pages for torch's CPU tensors; see METHOD.md
NOISY = ("torchao", "torch.utils._pytree")  # transformers imports torchao where it is, which warns of what it lacks
NAME = "bench.prefill"


def photograph(text: str) -> Any:
    """A decoded RGB image: a file that is no image, or half of one, is found now and not after the model is built."""
    from PIL import Image

    try:
        with Image.open(text) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text!r} does not exist") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read as an image ({error})") from None


def llava_folder(text: str) -> Path:
    """A local checkpoint of LLaVA-1.5 in transformers' format."""
    path = Path(text)
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except OSError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder with a readable config.json") from None
    except (ValueError, AttributeError):
        raise argparse.ArgumentTypeError(f"the config.json of {text!r} is not a JSON object") from None
    if model_type != "llava":
        raise argparse.ArgumentTypeError(f"expected a checkpoint of model_type 'llava', {text!r} has {model_type!r}")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise argparse.ArgumentTypeError(f"{text!r} holds no weights (*.safetensors or *.bin)")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="LLaVA-1.5 against LLaVA-STF, by stages.")

    def add(name: str, kind: Any = None, help: str = "", **options: Any) -> None:
        parser.add_argument(name, type=kind, help=help, **options)

    add("--preset", choices=sorted(SIZES), help="sizes; default: 7b with a GPU, cpu without")
    add("--model", llava_folder, "a LLaVA-1.5 checkpoint instead of a preset", metavar="FOLDER")
    add("--image", photograph, "default: the photograph in bench/assets", metavar="FILE")
    add("--batch", positive_int, "batch sizes", nargs="+", metavar="N")
    add("--text", positive_int, "text tokens around the images", nargs="+", metavar="N")
    add("--images", positive_int, "images, or frames, of a sequence", nargs="+", metavar="N")
    parser.add_argument("--sweep", action="store_true", help="one of the three at a time over a range")
    add("--json", command.writable_file, "default: .work/results/<device>/prefill.json", metavar="FILE")
    add("--report", command.writable_folder, "also report.html and its charts (default run)", metavar="DIR")
    parser.add_argument("--full", action="store_true", help="every row and column, decoding, and on a GPU all modes")
    add("--modes", choices=("eager", "graph", "compile"), nargs="+", help="default: eager; on a GPU also graph")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--decode", positive_int, "also decode N tokens per round", metavar="N")
    add("--rounds", positive_int, "exactly N rounds instead of as many as fit", metavar="N")
    add("--budget", positive_float, "no round begins that would end later", metavar="SECONDS")
    args = parser.parse_args(argv)
    if args.model and args.preset:
        parser.error("argument --model: give either --model or --preset, not both")
    return args


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse(argv)
    args.image = args.image or photograph(str(PHOTOGRAPH))
    for name, value in FLAGS.items():
        os.environ.setdefault(name, value)  # torch reads them when it is imported
    print("importing torch and transformers", file=sys.stderr)
    import torch

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        return command.bad_input(NAME, "--device: 'cuda' was asked for and torch sees no GPU; use --device cpu")
    try:
        args.preset = preset_of(args.model) if args.model else preset(args.preset or _default(args, has_gpu))
        device = args.device if args.device != "auto" else "cuda" if has_gpu and args.preset.name != "cpu" else "cpu"
        if "graph" in (args.modes or ()) and device == "cpu":
            return command.bad_input(NAME, "--modes: 'graph' needs a GPU; on a CPU use eager or compile")
        if problem := memory_problem(
            args.preset, points(args, args.preset), device, "--model" if args.model else "--preset"
        ):
            return command.bad_input(NAME, problem)
        return measure(args, device, began)
    except CheckpointError as error:
        return command.bad_input(NAME, f"--model: {error}")


def _default(args: argparse.Namespace, has_gpu: bool) -> str:
    return "7b" if has_gpu and args.device != "cpu" else "cpu"


def measure(args: argparse.Namespace, device: str, began: float) -> int:
    """Run, write the file and the page, print the table -> exit code."""
    from .. import results
    from .run import Run, is_broken
    from .table import report

    gpu = device == "cuda"
    args.modes = args.modes or (["eager", "graph", *["compile"] * args.full] if gpu else ["eager"])
    args.decode = args.decode or 8 * args.full
    # On a CPU torch.compile builds C++ for every layer of tower and language model: a minute a row, even of a toy.
    patience = 420.0 if gpu else 600.0 if "compile" in args.modes else 300.0 if args.full else 100.0
    path = args.json or results.results_folder(device) / "prefill.json"
    result = describe(args, device)

    def save() -> None:
        results.check(result, str(path))
        results.write(path, result)

    run = Run(args, device, began + (args.budget or patience), result, save)
    try:
        run.measure()
    except KeyboardInterrupt:
        if result["rows"]:
            save()
            print(f"\ninterrupted; {path} keeps what was measured", file=sys.stderr)
        return 130
    written, note = [path], None
    if args.report or args.json is None:
        from ..report.page import write_report

        page, note = write_report([path], args.report or path.parent)
        written.append(page)
    print(f"\n{report(result, full=args.full)}")
    if note:
        print(f"\n{note}")
    print(f"\n{'  '.join(map(str, written))}   ({time.monotonic() - began:.0f} s)")
    return 1 if result["refused"] or any(map(is_broken, result["rows"])) else 0


def describe(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """The fields of prefill.json that are known before anything is measured."""
    import torch

    from .. import results
    from .savings import SAVINGS

    flags = {name: os.environ.get(name) for name in FLAGS} | {"threads": torch.get_num_threads()}
    return {
        **results.describe("prefill", device),
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "preset": args.preset.name,
        "attention": "sdpa",
        "weights": f"{args.model.name}, LLaVA-STF's projector random" if args.model else "random",
        "output_tokens": 1,
        "decode_tokens": args.decode,
        "command": ["python", "-m", NAME, *sys.argv[1:]],
        "flags": {**flags, "tf32": torch.backends.cuda.matmul.allow_tf32},
        "savings_mean": SAVINGS,
        "clocks_mhz": [],
        **{"checks": [], "rows": [], "comparisons": [], "speedup": {}, "refused": None},
    }


if __name__ == "__main__":
    command.run(main)
