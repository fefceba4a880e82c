"""If this fails, a drawn call is computed wrongly, or touches memory outside an operand; the message holds the case.

The drawing is in tests/support/attack.py. `make fuzz` draws ten times as many, from other seeds.
"""

import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.processes import ROOT, clean_environment

pytest.importorskip("hypothesis")  # the child needs it; a GPU machine may lack it

RUNS = [  # kind, cases, interpreted
    ("functions", 200, False),
    ("modules", 400, False),
    ("functions", 200, True),
    ("modules", 400, True),
    ("stages", 600, True),
]


def attack(tmp_path, kind, cases, interpreted=True, cwd=ROOT):
    last = tmp_path / "last"
    environment = clean_environment(TRITON_INTERPRET="1" if interpreted else None)
    command = [sys.executable, "-m", "tests.support.attack", kind, "--cases", str(cases), "--last", str(last)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    return done, f"{done.stderr[-6000:]}\nthe last case: {last.read_text()}"


@pytest.mark.parametrize(("kind", "cases", "interpreted"), RUNS)
def test_drawn_calls(kind, cases, interpreted, tmp_path):
    if interpreted:
        pytest.importorskip("triton")
    done, said = attack(tmp_path, kind, cases, interpreted)
    assert done.returncode == 0, said
    assert done.stdout == f"{kind}\n"


DEFECTS = {
    "an unmasked bias load": ("tl.load(bias_ptr + n, mask=inside_n, other=0.0)", "tl.load(bias_ptr + n)"),
    "an unclamped row": ("m = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)",
                         "m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_seen(defect, tmp_path):
    """Both give the right result on every GPU until the neighbouring page is not there."""
    pytest.importorskip("triton")
    good, bad = DEFECTS[defect]
    shutil.copytree(ROOT / "stf_kernels", tmp_path / "stf_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    kernel = tmp_path / "stf_kernels" / "kernels" / "segmented_linear.py"
    source = kernel.read_text()
    assert source.count(good) == 1
    kernel.write_text(source.replace(good, bad))
    done, said = attack(tmp_path, "stages", 150, cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV, said
    assert "segmented_linear.py" in done.stderr  # the faulting frame
    assert "the last case: stages {" in said
