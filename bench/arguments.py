"""Command-line values, checked before anything heavy is imported: argparse prints the option and exits with 2."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


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


def writable_file(text: str) -> Path:
    """A path whose folder exists and takes a new file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file inside it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist; make it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written ({error.strerror})") from None
    return path


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


def writable_folder(text: str) -> Path:
    """A folder that exists, or can be made beside ones that do, and takes new files."""
    path = Path(text)
    writable_file(str((path if path.is_dir() else path.parent) / "report.html"))
    return path
