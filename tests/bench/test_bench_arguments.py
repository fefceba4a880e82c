"""If this fails, a bad option costs the user a model load before it is noticed, or ends in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_results import prefill_result

from bench import results

ROOT = Path(__file__).resolve().parents[2]
# Exits with the program's own status, or 99 when torch was imported on the way to the error.
RUN = """
import sys
from bench.prefill import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
sys.exit(99 if "torch" in sys.modules else status)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "option", "words"),
    [
        (["--preset", "70b"], "--preset", "'70b'"),
        (["--image", "absent.jpg"], "--image", "does not exist"),
        (["--image", "README.md"], "--image", "cannot be read as an image"),
        (["--json", "absent/folder/x.json"], "--json", "does not exist"),
        (["--json", "bench"], "--json", "is a folder"),
        (["--batch", "0"], "--batch", "at least 1"),
        (["--batch", "two"], "--batch", "'two'"),
        (["--rounds", "-1"], "--rounds", "at least 1"),
        (["--images", "0"], "--images", "at least 1"),
        (["--budget", "nan"], "--budget", "above 0"),
        (["--modes", "fast"], "--modes", "'fast'"),
        (["--model", "llava-hf/llava-1.5-7b-hf"], "--model", "config.json"),
        (["--model", "absent", "--preset", "cpu"], "--model", "'absent'"),
        (["--report", "absent/folder"], "--report", "does not exist"),
    ],
)
def test_bad_input_is_named_before_anything_is_loaded(arguments, option, words):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert option in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_found_before_anything_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    done = run("--model", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "expected a checkpoint of model_type 'llava'" in done.stderr
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    done = run("--model", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "is not a JSON object" in done.stderr


def test_a_checkpoint_without_weights_is_found_before_anything_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    done = run("--model", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "holds no weights" in done.stderr


def test_a_photograph_cut_short_is_found_before_anything_is_loaded(tmp_path):
    whole = (ROOT / "bench" / "assets" / "rocket.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    done = run("--image", str(tmp_path / "half.jpg"))
    assert done.returncode == 2, done.stderr
    assert "--image" in done.stderr


def test_a_file_that_cannot_be_written_is_named():
    done = run("--json", "/proc/prefill.json")
    assert done.returncode == 2, done.stderr
    assert "--json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["bench.roofline", "bench.report --compare FILE FILE"])
def test_a_reader_that_leaves_is_no_error(command, tmp_path):
    """`... | head -1`, here a pipe that nobody reads from the start."""
    file = tmp_path / "prefill.json"
    results.write(file, prefill_result())
    arguments = command.replace("FILE", str(file)).split()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupt_among_the_imports_has_no_traceback():
    code = "from bench import entry\ndef main(): raise KeyboardInterrupt\nentry.run(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
