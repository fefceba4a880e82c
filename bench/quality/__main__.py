"""What answers lose with fewer vision tokens.

    python -m bench.quality [--seeds 0 1 2]     the study of study.py; goes on where an interrupted one stopped
    python -m bench.quality --smoke             one of minutes; exit code 1 unless a trained STF has learnt
    python -m bench.quality --checkpoint DIR --questions FILE     any LLaVA or LLaVA-STF on a question file

The result file is written anew after every row. Exit codes: 0, 1 failed, 2 bad input, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import command

WORK = Path(__file__).resolve().parents[2] / ".work" / "quality"
SMOKE_ROWS = (("all tokens", "stage one"), ("average pooling", "untrained"), ("STF", "warm"))
CHANCE = 0.1 + 0.2  # of ten digits, and well above it


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description="Answers against vision tokens.")
    add, count = parser.add_argument, {"type": command.positive(int), "metavar": "N"}
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--smoke", action="store_true", help="one small seed of three rows, under five minutes on two cores")
    add("--work", type=Path, default=WORK, metavar="DIR", help="parts, to go on from; default .work/quality")
    add("--json", type=command.writable_file, metavar="FILE", help="default: quality.json in --work; a .png beside it")
    add("--checkpoint", type=command.model_folder, metavar="DIR", help="score this instead; with --questions")
    add("--questions", type=Path, metavar="FILE", help="a line: image, text, answer or answers")
    add("--images", type=Path, metavar="DIR", help="where image names start; default: the folder of FILE")
    add("--answers", type=Path, metavar="FILE", help="answers, to go on from; default: beside FILE")
    add("--batch", **count, default=8, help="questions at once, default 8")
    add("--tokens", **count, default=16, help="longest answer, default 16")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) != bool(args.questions):
        parser.error("--checkpoint, --questions: give both or neither")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.checkpoint:
        return score_checkpoint(args)
    try:
        import easy_vqa  # noqa: F401
        import sklearn  # noqa: F401
        import transformers

        from . import study
    except ImportError as error:
        raise command.BadInput(f"{error.name} is missing; install it: pip install '.[quality]'") from None
    transformers.logging.set_verbosity_error()
    return run(args, study)


def score_checkpoint(args: argparse.Namespace) -> int:
    """Of a folder with a LLaVA or LLaVA-STF."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import llava_integration  # noqa: F401

    from . import score

    folder, file, device = args.checkpoint, args.questions, "cuda" if torch.cuda.is_available() else "cpu"
    out = args.answers or file.with_suffix(f".{folder.resolve().name}.answers.jsonl")
    try:
        questions = score.read(file, args.images or file.parent)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
        processor = AutoProcessor.from_pretrained(folder)
    except OSError as error:
        raise command.BadInput(str(error).splitlines()[0]) from None
    print(f"{len(questions)} questions, answers into {out}", file=sys.stderr)
    found, rows = score.score(model, processor, questions, out, batch=args.batch, tokens=args.tokens), []
    for kind, exact in found["exact"].items():
        rows.append({"kind": kind, "exact match %": f"{100 * exact:.1f}"})
        rows[-1]["VQA accuracy %"] = f"{100 * found['vqa'][kind]:.1f}"
    print(command.table(rows))
    return 0


def run(args: argparse.Namespace, study: Any) -> int:
    import torch

    from .. import results

    wanted = [row for row in study.ROWS if not args.smoke or (row.model, row.start) in SMOKE_ROWS]
    seeds = args.seeds[:1] if args.smoke else args.seeds
    args.work = args.work / "smoke" if args.smoke else args.work
    args.work.mkdir(parents=True, exist_ok=True)
    made = study.Study(args.work, study.SMOKE if args.smoke else study.Budget())
    path, found = args.json or args.work / "quality.json", {row: [] for row in wanted}
    result = results.describe("quality", "cpu") | {"seeds": [], "rows": [], "budget": made.budget._asdict()}
    with command.progress(len(seeds) * len(wanted)) as begin:
        for seed in seeds:
            for row in wanted:
                begin(f"seed {seed}: {row.model}, {row.start}")
                torch.manual_seed(seed)
                if row.trained or not found[row]:
                    found[row].append(made.row(row, seed))
                result["rows"] = [study.summary(row, ones) for row, ones in found.items() if ones]
                results.write(path, result)
            result["seeds"].append(seed)
    result["complete"] = True
    results.write(path, result)
    print(command.table(cells(result["rows"]), left=2))
    print(f"\n{path}  {plot(result['rows'], path.with_suffix('.png'))}")
    if args.smoke:
        trained = next(row for row in result["rows"] if row["model"] == "STF")
        return int(trained["accuracy"]["digit"]["mean"] < CHANCE)
    return 0


def cells(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Column -> what it says, for every row."""
    found = []
    for row in rows:
        said = {"model": row["model"], "start": row["start"], "tokens": str(row["image_tokens"])}
        for kind, grades in row["accuracy"].items():
            said[kind] = f"{100 * grades['mean']:.1f} ± {100 * grades['std']:.1f}"
        said |= {"prefill ms": command.number(row["prefill_ms"]), "projector": f"{row['parameters']:,}"}
        found.append(said | {"seeds": str(row["seeds"])})
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> Path:
    """Accuracy on the detail and the coarse questions against vision tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, ("detail", "coarse"), strict=True):
        for index, row in enumerate(rows):
            point, marker = row["accuracy"][kind], "osD^v<>PX"[index % 9]
            place = row["image_tokens"] * 1.03 ** (index - len(rows) / 2)  # rows of as many tokens side by side
            name = f"{row['model']}, {row['start']}"
            axis.errorbar(place, 100 * point["mean"], 100 * point["std"], fmt=marker, capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="vision tokens", title=f"{kind} questions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact match, %")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    command.run(main)
