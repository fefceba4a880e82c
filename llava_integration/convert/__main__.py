"""The command line. Exit code 0: DST is whole; 2: one line on stderr says what is wrong, and DST is not there.

When it is stopped by a signal (130, 143, 129) DST is not there either; 141 and 74: DST is whole, the report was lost.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence

from stf_kernels.command import run

DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    # Only now: these imports take seconds, and --help should not.
    import torch
    from transformers.utils import logging

    from . import convert_llava, convert_official

    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # about old fields of SRC, which is only read
    convert: Callable = convert_llava if options.pop("command") == "llava" else convert_official
    options["dtype"] = None if options["dtype"] == "auto" else getattr(torch, options["dtype"])
    print("\n".join(convert(options.pop("src"), options.pop("dst"), **options).lines()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_integration.convert", description="Make a LLaVA-STF folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    official = commands.add_parser("official", help="from the released LLaVA-STF checkpoint")
    llava = commands.add_parser("llava", help="warm start from a LLaVA-1.5, NeXT or OneVision folder")
    for command in (official, llava):
        command.add_argument("src", metavar="SRC", help="local folder of the checkpoint; only read")
        command.add_argument("dst", metavar="DST", help="new folder")
        command.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: as in SRC")
        command.add_argument("--blocks", type=_layers, metavar="I,I,...", help="tower layers in concatenation order")
        command.add_argument("--allow-nonfinite", action="store_true", help="take weights that hold NaN or infinity")
        command.add_argument("--auto-map", action="store_true", help="add code for trust_remote_code=True")
    official.add_argument("--base", metavar="DIR", help="language model of a pretrained projector or LoRA adapter")
    official.add_argument("--vision-tower", metavar="DIR", help="CLIP or SigLIP, if mm_vision_tower is not local")
    llava.add_argument("--merge-size", type=int, metavar="R", help="side of the window; default: 2, or what divides")
    llava.add_argument("--truncate", action="store_true", help="drop rows and columns of patches that fill no window")
    return parser


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers such as 23,21,18, got {text!r}") from None


if __name__ == "__main__":
    run(main)
