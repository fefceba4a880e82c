"""If this fails, a part of `make gpu` that hangs, fails or cannot run passes for one that ran."""

import pytest
import torch

from bench import gpu, gpu_tests, kernels, processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_commands_say_that_there_is_no_gpu(capsys):
    assert gpu.main([]) == 2
    assert kernels.main([]) == 2
    assert capsys.readouterr().err.count("GPU") >= 2


def test_a_part_that_hangs_is_stopped_and_one_that_fails_is_seen(capfd):
    import sys

    status, output = processes.run_limited(
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2.0
    )
    assert status is None
    assert "begun" in output
    assert processes.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 30.0)[0] == 3


def test_counts_come_from_the_report_of_pytest(tmp_path):
    cases = '<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase>'
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counts = gpu_tests.read_junit(tmp_path / "r.xml")
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert gpu_tests.read_junit(tmp_path / "absent.xml")["missing"]


def test_tests_whose_package_is_missing_are_left_out():
    found = gpu_tests.tests_that_need(["hypothesis"])
    assert "tests/operators/test_drawn_shapes.py" in found
    assert "tests/bench/test_bench_stats.py" not in found
    assert gpu_tests.tests_that_need([]) == []
