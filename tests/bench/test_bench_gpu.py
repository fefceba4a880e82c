"""If this fails, time on a borrowed GPU is spent on a mistake that no GPU is needed to find, or a failure is lost."""

import json
import sys
import time
from pathlib import Path

import fake_cuda
import pytest
import torch
from PIL import Image
from sample_results import kernels_result, prefill_result

import stf_kernels.modules
from bench import gpu, meters, results
from bench.prefill import models, modes, run
from bench.prefill.__main__ import main
from bench.prefill.presets import Point, preset
from bench.prefill.speedup import label
from bench.roofline import Ceilings

JUNIT = '<s><testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase></s>'


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """A prefill as on a GPU: eager, captured and compiled, all rows, in bf16 and with device events."""
    path = tmp_path_factory.mktemp("gpu") / "prefill.json"
    with pytest.MonkeyPatch.context() as patch:
        fake_cuda.install(patch)
        build = models.build_stock
        patch.setattr(models, "build_stock", lambda sizes, *, device, **rest: build(sizes, device="cpu", **rest))
        patch.setattr(results, "clock_mhz", iter((345.0, 1980.0, 1755.0, 1830.0)).__next__)
        patch.setattr(run, "measure_ceilings", lambda *_: Ceilings(1e14, 1e12, "pretended"))
        patch.setattr(torch, "compile", lambda function, **_: function)  # a minute of C++ for each row, here
        with fake_cuda.OnCpu():
            arguments = ["--preset", "tiny", "--device", "cuda", "--full", "--rounds", "1", "--images", "2"]
            status = main([*arguments, "--json", str(path)])
        events = list(fake_cuda.Event.made)
    return status, results.read(path), events


def test_every_mode_is_measured_as_on_a_gpu(pretended):
    status, result, events = pretended
    assert status == 0
    assert (result["device"], result["dtype"]) == ("Pretended GPU", "bfloat16")
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
    assert external
    assert len(external) % 4 == 0
    assert len(external) < len(events)


def test_captured_rows_are_compared_with_captured_and_with_eager(pretended):
    result = pretended[1]
    found = {(c["row"], c["mode"], c["baseline_mode"]) for c in result["comparisons"]}
    assert {("llava-stf/fused", "graph", "graph"), ("llava-stf/fused", "graph", "eager")} <= found
    across = [check["name"].split(",")[0] for check in result["checks"] if "against its eager run" in check["name"]]
    assert across.count("logits") == 10
    assert across.count("image features") == 5  # those of a compiled run cannot be watched
    assert all(check["agrees"] for check in result["checks"])


def captured(row, device="cuda", dtype=torch.float32, batch=1):
    """A captured row that has run once."""
    sizes, point = preset("tiny"), Point(batch, 4)
    pixels = models.image_processor(sizes)(Image.new("RGB", (56, 56), "red"), point.batch)
    inputs = models.build_inputs(sizes, pixels, point, row.image_tokens, device="cpu", dtype=dtype)
    cell = (modes.Captured if device == "cuda" else modes.Eager)(row, point, device)
    with torch.no_grad():
        cell.warm_up(inputs)
    return cell


def rows_of(dtype=torch.float32):
    rows = models.build_rows(models.build_stock(preset("tiny"), device="cpu", dtype=dtype), preset("tiny"), full=True)
    models.randomise(rows[-1].module.model.multi_modal_projector, 2)
    return rows


def test_a_captured_row_runs_the_layers_of_its_eager_run(monkeypatch):
    """The runner itself would skip the unread layer for every row."""
    fake_cuda.install(monkeypatch)
    seen = {}
    for row in rows_of():
        cell, layers = captured(row), []
        hooks = [
            layer.register_forward_hook(lambda *_, layers=layers: layers.append(1))
            for layer in row.module.model.vision_tower.encoder.layers
        ]
        cell._call()
        seen[row.name] = len(layers)
        [hook.remove() for hook in hooks]
    assert set(seen.values()) == {23, 24}
    assert [name for name, layers in seen.items() if layers == 23] == ["llava-1.5-skip/mlp2x"]


def test_one_row_that_a_captured_insertion_misses_is_found(monkeypatch):
    """In bf16 the logits, behind a whole language model, may differ by less than is allowed."""
    fake_cuda.install(monkeypatch)
    row, half = rows_of(torch.bfloat16)[-1], {"dtype": torch.bfloat16, "batch": 2}
    eager, right = captured(row, "cpu", **half), captured(row, **half)
    forward = stf_kernels.modules.CompactTokenProjector.forward

    def misses_the_last(self, blocks, grid=None, *, out, rows):
        kept = out[rows[-1:]].clone()
        forward(self, blocks, grid, out=out, rows=rows)
        out[rows[-1:]] = kept
        return out

    monkeypatch.setattr(stf_kernels.modules.CompactTokenProjector, "forward", misses_the_last)
    wrong = captured(row, **half)
    assert right.features.shape == (2 * 4, 64)
    for cell, agrees in ((right, True), (wrong, False)):
        assert meters.compare("", cell.features, eager.features, meters.ACROSS)["agrees"] == agrees
    assert meters.compare("", wrong.logits, eager.logits, meters.LOGITS)["agrees"]


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
    for command, seconds in commands:
        assert command[:2] == [sys.executable, "-m"]  # nothing that a bare machine lacks
        if "--budget" in command:  # a program is told to end before it is stopped
            assert float(command[command.index("--budget") + 1]) < seconds
    assert sum(gpu.SECONDS.values()) < 560  # of ten minutes


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
    found = gpu.run_pytest([str(suite)], tmp_path, 60.0)
    assert [found[key] for key in ("passed", "failed", "skipped", "status")] == [6, 1, 0, 1]
    assert found["failures"] == ["test_suite::test_one[5]"]
    suite.write_text("def test_one():\n    __import__('os')._exit(3)\n")
    assert gpu.run_pytest([str(suite), "-p", "no:xdist"], tmp_path, 60.0)["failures"]
    assert not list(tmp_path.glob("*.xml"))


def test_tests_whose_package_is_missing_are_left_out():
    found = gpu.tests_that_need(["hypothesis"])
    assert "tests/operators/test_drawn_shapes.py" in found
    assert "tests/bench/test_bench_floors.py" not in found
    assert gpu.tests_that_need([]) == []


def test_a_part_that_hangs_is_stopped_with_what_it_has_started(tmp_path, capfd):
    code = (
        "import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    command = [sys.executable, "-c", f"{code}\nprint(child.pid, flush=True)\ntime.sleep(60)"]
    assert gpu.run_limited(command, 3.0) is None
    stat = Path(f"/proc/{capfd.readouterr().out.split()[-1]}/stat")
    until = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    assert gpu.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 30.0) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_commands_say_so(capsys):
    from bench.kernels.__main__ import main as kernels

    assert gpu.main([]) == 2
    assert kernels([]) == 2
    assert capsys.readouterr().err.count("GPU") >= 2
