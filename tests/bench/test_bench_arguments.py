"""If this fails, a bad option costs the user a model load before it is noticed, or ends in a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Exits with the program's own status, or 99 when torch was imported on the way to the error.
RUN = """
import sys
sys.orig_argv = ["python", "-m", "bench.prefill"]
from bench.prefill.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
sys.exit(99 if "torch" in sys.modules else status)
"""


def run(*arguments):
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def refused(option, words, *arguments):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert option in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "70b"], "'70b'"),
        (["--image", "absent.jpg"], "does not exist"),
        (["--image", "README.md"], "cannot be read as an image"),
        (["--json", "bench"], "is a folder"),
        (["--json", "/proc/prefill.json"], "cannot be written"),
        (["--batch", "0"], "at least 1"),
        (["--batch", "two"], "'two'"),
        (["--rounds", "-1"], "at least 1"),
        (["--budget", "nan"], "above 0"),
        (["--modes", "fast"], "'fast'"),
        (["--model", "absent", "--preset", "cpu"], "'absent'"),
        (["--family", "qwen"], "'qwen'"),
        (["--family", "llava-onevision", "--preset", "13b"], "got '13b'"),
        (["--family", "llava-next", "--images", "2"], "got ['images']"),
    ],
)
def test_bad_input_is_named_before_anything_is_loaded(arguments, words):
    refused(arguments[0], words, *arguments)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "qwen2_vl"}', "expected a checkpoint of model_type 'llava'"),
        ('{"model_type": "lla', "is not a JSON object"),
        ('{"model_type": "llava"}', "holds no weights"),
    ],
)
def test_half_a_file_or_checkpoint_is_found_before_anything_is_loaded(tmp_path, config, words):
    (tmp_path / "config.json").write_text(config)
    refused("--model", words, "--model", tmp_path)
    whole = (ROOT / "bench" / "assets" / "raccoon.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    refused("--image", "cannot be read", "--image", tmp_path / "half.jpg")
