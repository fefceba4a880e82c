"""If this fails, a bad option costs the user a model load before it is noticed, or ends in a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    (["--preset", "70b"], "'70b'"),
    (["--image", "absent.jpg"], "No such file"),
    (["--image", "README.md"], "cannot be read as an image"),
    (["--image", "HALF"], "cannot be read as an image"),
    (["--json", "bench"], "is a folder"),
    (["--json", "/proc/prefill.json"], "cannot be written"),
    (["--batch", "0"], "at least 1"),
    (["--batch", "two"], "'two'"),
    (["--rounds", "-1"], "at least 1"),
    (["--budget", "nan"], "above 0"),
    (["--modes", "fast"], "'fast'"),
    (["--model", "absent"], "has no config.json"),
    (["--family", "qwen"], "'qwen'"),
    (["--family", "llava-onevision", "--preset", "13b"], "got '13b'"),
    (["--family", "llava-next", "--images", "2"], "got ['images']"),
]
# Each case in its turn, in one process: its status, or 99 once torch is imported, and what it says.
RUN = """
import contextlib, io, json, sys
sys.orig_argv = ["python", "-m", "bench.prefill"]
from bench.prefill.__main__ import main
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = main(arguments)
    except SystemExit as end:
        status = end.code
    print(json.dumps([99 if "torch" in sys.modules else status, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    half = tmp_path_factory.mktemp("half") / "half.jpg"
    whole = (ROOT / "bench" / "assets" / "raccoon.jpg").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    given = json.dumps([arguments for arguments, _ in CASES]).replace("HALF", str(half))
    done = subprocess.run([sys.executable, "-c", RUN, given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(arguments) for arguments, _ in CASES])
def test_bad_input_is_named_before_anything_is_loaded(answers, index):
    (arguments, words), (status, said) = CASES[index], answers[index]
    assert status == 2, said
    assert arguments[0] in said
    assert words in said
