"""If this fails, a drawn call is computed wrongly, or touches memory outside an operand; the message holds the case.

The drawing is in tests/support/attack.py. `make fuzz` draws ten times as many, from other seeds.
"""

import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.processes import ROOT, clean_environment

pytest.importorskip("hypothesis")  # the child needs it; a GPU machine may lack it

OPERATORS = ["concat_linear", "spatial_merge_linear", "indexed_rows"]
MODULES = ["MultiBlockTokenFusion", "SpatialTokenFusion", "CompactTokenProjector"]
RUNS = {  # kinds, cases of each, interpreted; an operator is drawn two hundred times, half of them on the torch path
    "torch": ([*OPERATORS, *MODULES], 100, False),
    "operators": (OPERATORS, 100, True),
    "modules": (MODULES, 100, True),
    "forms": (["pointer", "tma", "swap_ab"], 200, True),
    "weight gradient": (["weight_gradient"], 200, True),
}


def attack(tmp_path, kinds, cases, interpreted=True, cwd=ROOT):
    last = tmp_path / "last"
    environment = clean_environment(TRITON_INTERPRET="1" if interpreted else None)
    command = [sys.executable, "-m", "tests.support.attack", *kinds, "--cases", str(cases), "--last", str(last)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    return done, f"{done.stderr[-6000:]}\nthe last case: {last.read_text()}"


@pytest.mark.parametrize("run", RUNS)
def test_drawn_calls(run, tmp_path):
    kinds, cases, interpreted = RUNS[run]
    if interpreted:
        pytest.importorskip("triton")
    done, said = attack(tmp_path, kinds, cases, interpreted)
    assert done.returncode == 0, said
    counted = dict(re.findall(r"^(\w+) .*'cases': (\d+)", done.stdout, re.MULTILINE))
    assert {kind: int(counted[kind]) >= cases // 2 for kind in kinds} == dict.fromkeys(kinds, True), done.stdout
    for form in {"tma", "swap_ab"} & set(kinds):  # not the pointer form in its place
        assert int(re.search(rf"^{form} .*'refused': (\d+)|$", done.stdout, re.MULTILINE)[1] or 0) < cases / 4


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
    done, said = attack(tmp_path, ["pointer"], 50, cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV, said
    assert "segmented_linear.py" in done.stderr  # the faulting frame
    assert "the last case: pointer {" in said
