"""If this fails, a gradient of a two-process run (DDP, FSDP2, DTensor) is not the one of a single process.

Two processes on gloo, meeting in a file, run every case of distributed_worker.py once; each test reads its line.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, clean_environment

WORKER = Path(__file__).with_name("distributed_worker.py")
CASES = ["ddp", "ddp_frozen_layers", "fsdp_whole", "fsdp_children", "fsdp_one_child", "fsdp_linears"]
CASES += [f"dtensor_{what}" for what in ("replicated", "weight_plain_blocks", "function", "bias_alone", "out")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    options = {"cwd": ROOT, "env": clean_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [
        subprocess.Popen([sys.executable, WORKER, str(rank), store, *CASES], text=True, **options) for rank in range(2)
    ]
    try:
        return [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("case", CASES)
def test_two_processes(outputs, case):
    for output in outputs:
        lines = [line for line in output.splitlines() if line.startswith(f"{case}: ")]
        assert lines == [f"{case}: passed"], lines or output[-3000:]
