"""If these fail, a test is run by no process of `make gpu`, or a failure in one of them is lost."""

import sys
import time

import pytest

from bench import gpu_tests, processes

SUITE = """
import pytest
@pytest.mark.parametrize("i", range(7))
def test_one(i):
    assert i != 5
"""
COUNTED = ("passed", "failed", "skipped")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Seven tests, one of which fails, under the checkout's own conftest."""
    (tmp_path / "conftest.py").write_text((processes.ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(gpu_tests, "WORKERS", 3)
    return tmp_path


def test_every_test_is_in_one_share_and_a_failure_in_any_is_seen(suite, capfd):
    found = gpu_tests.run_shares([str(suite)], suite, 60.0)
    assert [found[key] for key in COUNTED] == [6, 1, 0]
    assert found["exit_status"] == [0, 0, 1]
    [failure] = found["failures"]
    assert failure.endswith("test_suite::test_one[5]")
    assert found["missing"] == 0
    assert "assert 5 != 5" in "".join(found["output_tails"])
    assert not list(suite.glob("*.xml"))


def test_a_share_that_crashes_costs_its_own_tests_and_is_said(suite, capfd):
    text = SUITE.replace("assert i != 5", "assert i != 5 or __import__('os')._exit(3)")
    (suite / "test_suite.py").write_text(text)
    found = gpu_tests.run_shares([str(suite)], suite, 60.0)
    assert [found[key] for key in COUNTED] == [5, 0, 0]
    assert found["exit_status"] == [0, 0, 3]
    assert found["missing"] == 1


def test_an_interruption_ends_every_process(monkeypatch, capfd):
    started = []
    real = processes.subprocess.Popen
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    command = [sys.executable, "-c", "print('on', flush=True); import time; time.sleep(60)"]

    def interrupted():
        with processes.at_once(2) as pool:
            for _ in range(2):
                pool.submit(processes.run_limited, command, 50.0)
            while len(processes._running) < 2:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [process.wait(5) for process in started] == [-9, -9]


def test_one_core_compiles_nothing_ahead(monkeypatch):
    monkeypatch.setattr(gpu_tests, "WORKERS", 1)
    assert gpu_tests.compilations() == []
    monkeypatch.setattr(gpu_tests, "WORKERS", 8)
    from bench.kernels import parse

    tables = [parse(command[3:]) for command in gpu_tests.compilations() if command[2] == "bench.kernels"]
    assert all(table.warm for table in tables)
    assert {stage for table in tables for stage in table.stage} == {"chain", "G1", "G2", "G3", "G4"}
