"""If this fails, time on a borrowed GPU is spent on a mistake that no GPU is needed to find, or a failure is lost."""

import json
import sys
import time
from pathlib import Path

import fake_cuda
import pytest
import torch
from support.sample_results import kernels_result, prefill_result

import llava_integration
from bench import gpu, results
from bench.command import BadInput
from bench.kernels import __main__ as kernels
from bench.prefill import models, run
from bench.prefill.__main__ import main
from bench.prefill.table import label
from bench.roofline import Ceilings

JUNIT = '<s><testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase></s>'


def pretend(path, *arguments):
    """A prefill as on a GPU, in bf16 and with device events."""
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.install(patch)
        build = models.build_stock
        patch.setattr(models, "build_stock", lambda sizes, *, device, **rest: build(sizes, device="cpu", **rest))
        patch.setattr(results, "clock_mhz", iter((345.0, 1980.0, 1755.0, 1830.0)).__next__)
        patch.setattr(run, "measure_ceilings", lambda *_: Ceilings(1e14, 1e12, "pretended"))
        patch.setattr(torch, "compile", lambda function, **_: function)  # a minute of C++ for each row, here
        runner, towers = llava_integration.PrefillRunner, []

        def spy(*arguments, full_tower, **options):
            towers.append(full_tower)
            return runner(*arguments, full_tower=full_tower, **options)

        patch.setattr(llava_integration, "PrefillRunner", spy)
        with fake_cuda.OnCpu():
            arguments = ["--preset", "tiny", "--device", "cuda", "--rounds", "1", *arguments, "--json", str(path)]
            status = main([*arguments, "--budget", "10000"])  # on a busy machine, too
        events = list(fake_cuda.Event.made)
    return status, results.read(path), events, towers


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """Eager, captured and compiled, all rows."""
    return pretend(tmp_path_factory.mktemp("gpu") / "prefill.json", "--full", "--images", "2")


def test_tiles_are_captured_too(tmp_path):
    status, result, *_ = pretend(tmp_path / "prefill.json", "--family", "llava-next", "--modes", "eager", "graph")
    assert (status, [row["failed"] for row in result["rows"]]) == (0, [None] * 4)


def test_every_mode_is_measured_and_compared_as_on_a_gpu(pretended):
    status, result, events, towers = pretended
    assert (status, result["device"], result["dtype"]) == (0, "Pretended GPU", "bfloat16")
    assert [row["mode"] for row in result["rows"]] == ["eager"] * 5 + ["graph"] * 5 + ["compile"] * 5
    for row in result["rows"]:
        assert row["failed"] is None
        assert row["image_tokens"] == 2 * (16 if row["projector"] == "mlp2x" and "pool" not in row["model"] else 4)
        staged = [row[f"{stage}_ms"] is not None for stage in ("vision", "projector", "insert", "prefill")]
        assert staged == [row["mode"] != "compile"] * 4  # the boundaries would break a compiled graph
        assert row["total_ms"] > 0
        assert row["peak_mb"] == pytest.approx(row["weights_mb"] + 2048)  # 3 GiB at the peak, 1 GiB before
    kv = {(label(row), row["mode"]): row["kv_mb"] for row in result["rows"]}
    assert all(kv[name, "eager"] == kv[name, "graph"] for name, _ in kv)
    assert result["clock_mhz"] == 345.0  # idle
    assert result["clocks_mhz"] == [1980.0, 1755.0, 1830.0]  # behind the work of every group
    # Only the events inside a graph are external: four boundaries of each call that is watched.
    external = [options for options in events if options.get("external")]
    assert len(external) % 4 == 0
    assert 0 < len(external) < len(events)
    assert towers == [True, False, True, True, True]  # captured, too, only one row skips the unread layer
    found = {(c["row"], c["mode"], c["baseline_mode"]) for c in result["comparisons"]}
    assert {("llava-stf/fused", "graph", "graph"), ("llava-stf/fused", "graph", "eager")} <= found
    across = [check["name"].split(",")[0] for check in result["checks"] if "against its eager run" in check["name"]]
    assert across.count("logits") == 10
    assert across.count("image features") == 5  # those of a compiled run cannot be watched
    assert all(check["agrees"] for check in result["checks"])


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """bench.gpu whose processes write their files at once; `statuses` says how each ends, `commands` what was run."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STF_COMMIT", "c0ffee")
    statuses, commands = {}, []
    texts = {"prefill": json.dumps(prefill_result()), "kernels": json.dumps(kernels_result())}

    def pretend(command, seconds):
        name = command[2].removeprefix("bench.")
        commands.append((command, seconds))
        if name == "pytest":
            name = command[-1]
            path = next(a.split("=", 1)[1] for a in command if a.startswith("--junitxml="))
        else:
            path = command[command.index("--json") + 1]
        if statuses.get(name) != "nothing":
            Path(path).write_text(texts.get(name, JUNIT.replace("<failure/>", "")))
        return statuses.get(name, 0)

    monkeypatch.setattr(gpu, "run_limited", pretend)
    return statuses, commands, tmp_path / "out" / "pretended-gpu"


def test_every_part_leaves_its_file_under_out(parts, capsys):
    _, commands, folder = parts
    assert gpu.main([]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["kernels.json", "prefill.json", "tests.json"]
    tests = results.read(folder / "tests.json")  # of the device and of the rest
    assert (tests["commit"], tests["passed"], tests["skipped"], tests["complete"]) == ("c0ffee", 4, 2, True)
    assert capsys.readouterr().out.count("passed  ") == 3
    assert all(command[:2] == [sys.executable, "-m"] for command, _ in commands)  # nothing that a bare machine lacks
    for command, seconds in commands[-2:]:  # a program is told to end before it is stopped
        assert float(command[command.index("--budget") + 1]) < seconds
    assert sum(gpu.SECONDS[name] for name in ("tests", "kernels", "prefill")) < 560  # of ten minutes


@pytest.mark.parametrize(("cores", "gb", "count"), [(16, 79, 6), (16, 140, 11), (16, 8, 1), (2, 79, 2), (None, 79, 1)])
def test_memory_bounds_the_processes_of_the_device_tests_and_their_number_the_time(
    parts, monkeypatch, cores, gb, count
):
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gb << 30, gb << 30))
    assert gpu.workers() == count
    assert gpu.main(["--only", "tests"]) == 0
    [(on_device, seconds), (_, others)] = parts[1]
    assert ("-n" in on_device) == (count > 1)
    assert seconds == pytest.approx(max(0.6 * gpu.SECONDS["tests"], 420.0 / count))
    assert others >= 60.0  # however long the first took


@pytest.mark.parametrize(
    ("status", "words"), [(0, "nothing out of"), (99, "memory errors"), (3, "exit status 3"), (None, "time limit")]
)
def test_what_compute_sanitizer_says(parts, monkeypatch, capsys, status, words):
    """What CUDA's own calls return is no failure."""
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.main(["--only", "sanitizer"]) == 1
    assert "compute-sanitizer is not installed" in capsys.readouterr().out
    commands = []
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu, "run_limited", lambda command, seconds: commands.append(command) or status)
    assert gpu.main(["--only", "sanitizer"]) == int(status != 0)
    assert words in capsys.readouterr().out
    [command] = commands
    assert command[:5] == ["/usr/bin/compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "99"]
    assert (results.ROOT / command[-1]).is_file()


@pytest.mark.parametrize("part", ["tests/gpu", "tests", "kernels", "prefill"])
def test_a_part_that_fails_is_said_and_the_others_still_run(parts, part, capsys):
    parts[0][part] = 3
    assert gpu.main([]) == 1
    assert len(list(parts[2].iterdir())) == 3
    failed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  FAILED")]
    assert failed == [part.split("/")[0]]


def test_an_error_of_this_program_or_an_old_file_does_not_pass_for_a_run(parts, monkeypatch, capsys):
    results.write(parts[2] / "kernels.json", kernels_result())
    parts[0]["kernels"] = "nothing"  # was written
    monkeypatch.setattr(gpu, "run_pytest", lambda *_: 1 / 0)
    assert gpu.main([]) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed
    assert "cannot be read (No such file or directory); exit status nothing" in printed
    assert (parts[2] / "prefill.json").is_file()


def test_counts_and_failures_come_from_the_report_of_pytest(tmp_path, capfd):
    suite = tmp_path / "test_suite.py"
    suite.write_text("import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_one(i):\n    assert i != 5\n")
    found = gpu.run_pytest([str(suite)], tmp_path, 600.0)
    assert [found[key] for key in ("passed", "failed", "skipped", "status")] == [6, 1, 0, 1]
    assert found["failures"][0].endswith("test_suite::test_one[5]")
    suite.write_text("def test_one():\n    __import__('os')._exit(3)\n")
    assert gpu.run_pytest([str(suite), "-p", "no:xdist"], tmp_path, 600.0)["failures"] == ["no report was left"]
    # Left out where that is missing.
    assert "tests/convert/test_convert_hostile.py" in gpu.tests_that_need(["hypothesis"])
    assert gpu.tests_that_need([]) == []


def test_a_part_that_hangs_is_stopped_with_what_it_has_started(tmp_path, monkeypatch):
    """The limit comes when the child is there, however long that takes."""
    file, wait = tmp_path / "pid", gpu.subprocess.Popen.wait

    def limit(self, seconds=None):
        while seconds == 3.0 and not (file.exists() and file.read_text()):
            time.sleep(0.01)
        return wait(self, 0.0 if seconds == 3.0 else seconds)

    monkeypatch.setattr(gpu.subprocess.Popen, "wait", limit)
    code = "import subprocess, sys, time\nchild = subprocess.Popen(['sleep', '600'])\n"
    code += f"open({str(file)!r}, 'w').write(str(child.pid))\ntime.sleep(600)"
    assert gpu.run_limited([sys.executable, "-c", code], 3.0) is None
    stat, until = Path(f"/proc/{file.read_text()}/stat"), time.monotonic() + 60
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert gpu.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 600.0) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_commands_say_so():
    for command in (gpu, kernels):
        with pytest.raises(BadInput, match="GPU"):
            command.main([])
