"""If this fails, a gradient of a two-process run (DDP, FSDP2, DTensor) is not the one of a single process.

Two processes on gloo, meeting in a file, run every case of distributed_worker.py.
"""

import subprocess
import sys
from pathlib import Path

from support.processes import ROOT, clean_environment

WORKER = Path(__file__).with_name("distributed_worker.py")


def test_two_processes(tmp_path):
    options = {"cwd": ROOT, "env": clean_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [
        subprocess.Popen([sys.executable, WORKER, str(rank), tmp_path / "store"], text=True, **options)
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-6000:]
