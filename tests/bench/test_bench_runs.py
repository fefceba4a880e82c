"""If this fails, `make prefill`, the kernel table or `make gpu` does not run, or reports what it should refuse."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import gpu, group, kernels, prefill, results
from bench.models import build_stock
from bench.modes import Eager
from bench.presets import PRESETS

TINY = ["--preset", "tiny", "--device", "cpu", "--batch", "1"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "prefill.json"
    status = prefill.main([*TINY, "--full", "--rounds", "3", "--decode", "2", "--json", str(path)])
    return status, results.read(path)


def test_five_rows_are_measured_and_agree(full_run):
    status, result = full_run
    assert status == 0
    assert result["complete"]
    assert [(r["model"], r["projector"], r["image_tokens"]) for r in result["rows"]] == [
        ("llava-1.5", "mlp2x", 16), ("llava-1.5-skip", "mlp2x", 16), ("llava-1.5-pool", "mlp2x", 4),
        ("llava-stf", "reference", 4), ("llava-stf", "fused", 4),
    ]  # fmt: skip
    assert len(result["checks"]) == 5
    assert all(check["agrees"] for check in result["checks"])
    assert len(result["speedup"]) == 4


def test_every_row_has_times_memory_and_its_samples(full_run):
    for row in full_run[1]["rows"]:
        assert row["rounds"] == 3
        assert len(row["samples"]["total_ms"]) == len(row["preprocess_samples"]) == len(row["decode_samples"]) == 3
        for index in range(3):
            parts = sum(row["samples"][s][index] for s in ("vision_ms", "projector_ms", "insert_ms", "prefill_ms",
                                                           "first_token_ms"))  # fmt: skip
            assert parts == pytest.approx(row["samples"]["total_ms"][index])
        assert row["peak_mb"] == pytest.approx(row["weights_mb"] + row["activations_mb"])
        assert 0 < row["projector_share"] < 1
        assert row["floor_ms"]["total_ms"] > 0
    kv = {row["image_tokens"]: row["kv_mb"] for row in full_run[1]["rows"]}
    # 2 (keys, values) * 2 layers * tokens * 64 channels * 4 bytes
    assert kv[16] * 2**20 == 2 * 2 * (16 + 8) * 64 * 4
    assert kv[4] * 2**20 == 2 * 2 * (4 + 8) * 64 * 4


def test_a_checkpoint_takes_the_place_of_a_preset(tmp_path):
    stock = build_stock(PRESETS["tiny"], device="cpu", dtype=torch.float32, seed=5)
    stock.save_pretrained(tmp_path / "small-llava")
    arguments = ["--model", str(tmp_path / "small-llava"), "--device", "cpu", "--rounds", "1", "--text", "5"]
    assert prefill.main([*arguments, "--json", str(tmp_path / "x.json"), "--report", str(tmp_path)]) == 0
    result = results.read(tmp_path / "x.json")
    assert (result["preset"], result["weights"].split(",")[0]) == ("small-llava", "small-llava")
    assert {row["text_tokens"] for row in result["rows"]} == {5}
    assert len(result["speedup"]) == 2
    assert "small-llava" in (tmp_path / "report.html").read_text()


def test_the_fused_row_is_this_library(monkeypatch, tmp_path):
    import stf_kernels

    seen = set()
    original = Eager.run

    def spy(self):
        seen.add((self.row.name, type(self.row.activate().model.multi_modal_projector).__module__.split(".")[0]))
        return original(self)

    monkeypatch.setattr(Eager, "run", spy)
    prefill.main([*TINY, "--rounds", "1", "--json", str(tmp_path / "x.json")])
    assert ("llava-stf/fused", stf_kernels.__name__) in seen
    assert ("llava-stf/reference", "reference") in seen


def test_the_stopwatch_leaves_the_fused_row_on_its_in_place_path(monkeypatch, tmp_path):
    from llava_integration.modeling import LlavaStfModel

    chosen = []
    original = LlavaStfModel._writes_in_place

    def spy(self, embeds):
        chosen.append(original(self, embeds))
        return chosen[-1]

    monkeypatch.setattr(LlavaStfModel, "_writes_in_place", spy)
    prefill.main([*TINY, "--rounds", "1", "--json", str(tmp_path / "x.json")])
    assert chosen
    assert all(chosen)


def test_no_speed_up_when_fused_and_reference_differ(monkeypatch, tmp_path, capsys):
    original = Eager.output

    def wrong(self):
        output = original(self)
        if self.row.name == "llava-stf/fused":
            output.features = output.features * 1.01
        return output

    monkeypatch.setattr(Eager, "output", wrong)
    path = tmp_path / "prefill.json"
    assert prefill.main([*TINY, "--rounds", "1", "--json", str(path)]) == 1
    result = results.read(path)
    assert result["speedup"] == {}
    assert result["comparisons"] == []
    assert "image features, llava-stf/fused" in result["refused"]
    printed = capsys.readouterr().out
    assert "NO SPEED-UP IS REPORTED" in printed
    assert not re.search(r"\d\.\d\dx", printed)


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path):
    original = group.Group.round

    def interrupted(self, index):
        if index == 2:
            raise KeyboardInterrupt
        original(self, index)

    monkeypatch.setattr(group.Group, "round", interrupted)
    path = tmp_path / "prefill.json"
    assert prefill.main([*TINY, "--rounds", "5", "--json", str(path)]) == 130
    result = results.read(path)
    assert result["complete"] is False
    assert {row["rounds"] for row in result["rows"]} == {2}


def test_a_row_that_does_not_fit_says_so_and_the_rest_goes_on(monkeypatch, tmp_path):
    original = Eager.output

    def too_large(self):
        if self.row.name == "llava-1.5/mlp2x":
            raise torch.OutOfMemoryError("no room")
        return original(self)

    monkeypatch.setattr(Eager, "output", too_large)
    path = tmp_path / "prefill.json"
    assert prefill.main([*TINY, "--rounds", "1", "--json", str(path)]) == 0
    first, *others = results.read(path)["rows"]
    assert "does not fit" in first["failed"]
    assert first["total_ms"] is None
    assert all(row["total_ms"] > 0 for row in others)
    assert results.read(path)["speedup"] == {}  # nothing to compare with


def test_a_size_that_cannot_fit_is_refused_from_its_numbers(monkeypatch, capsys):
    monkeypatch.setattr("bench.memory.available_bytes", lambda device: 1 << 30)
    assert prefill.main(["--preset", "13b", "--device", "cpu"]) == 2
    assert "--preset" in capsys.readouterr().err


def test_rounds_stop_at_the_budget(monkeypatch):
    class Slow:
        measurable, taken = True, 0

        def round(self, index):
            self.taken += 1

    slow = Slow()
    assert group.take_rounds(slow, fewest=2, most=9, until=0.0) == 2
    assert group.take_rounds(slow, fewest=2, most=9, until=float("inf")) == 9
    assert slow.taken == 11


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run there")
def test_the_kernel_table_runs_small_and_its_schema_holds(tmp_path):
    path = tmp_path / "kernels.json"
    arguments = ["--small", "--no-compile", "--batch", "1", "--dtype", "float32", "--json", str(path)]
    assert kernels.main(arguments) == 0
    result = results.read(path)
    stages = {(row["stage"], row["pass"]) for row in result["rows"] if row["provider"] == "stf"}
    assert stages == {(s, "forward") for s in kernels.STAGES} | {("chain", "forward+backward")}
    assert all(row["rel_error"] <= row["allowed_error"] for row in result["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run there")
def test_a_wrong_kernel_gets_no_time(monkeypatch, tmp_path):
    import stf_kernels

    right = stf_kernels.spatial_merge_linear
    monkeypatch.setattr(stf_kernels, "spatial_merge_linear", lambda *a, **k: right(*a, **k) * 1.001)
    path = tmp_path / "kernels.json"
    arguments = ["--small", "--no-compile", "--batch", "1", "--dtype", "float32", "--stage", "G3", "--json", str(path)]
    assert kernels.main(arguments) == 1
    rows = {row["provider"]: row for row in results.read(path)["rows"]}
    assert "wrong" in rows["stf"]["failed"]
    assert rows["stf"]["us_eager"] is None
    assert rows["eager"]["us_eager"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run there")
def test_a_rival_that_does_not_run_costs_only_its_own_row(monkeypatch, tmp_path):
    def absent(*_):
        raise RuntimeError("no convolution here")

    monkeypatch.setattr("bench.providers._conv2d", absent)
    path = tmp_path / "kernels.json"
    arguments = ["--small", "--no-compile", "--batch", "1", "--dtype", "float32", "--stage", "G3", "--json", str(path)]
    assert kernels.main(arguments) == 0
    rows = {row["provider"]: row for row in results.read(path)["rows"]}
    assert "no convolution here" in rows["conv2d"]["failed"]
    assert rows["stf"]["us_eager"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_commands_say_that_there_is_no_gpu(capsys):
    assert gpu.main([]) == 2
    assert kernels.main([]) == 2
    assert capsys.readouterr().err.count("GPU") >= 2


def test_a_part_that_hangs_is_stopped_and_one_that_fails_is_seen(capfd):
    import sys

    status, output = gpu.run_limited(
        [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2.0
    )
    assert status is None
    assert "begun" in output
    assert gpu.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 30.0)[0] == 3


def test_counts_come_from_the_report_of_pytest(tmp_path):
    cases = '<testcase name="a"/><testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase>'
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counts = gpu.read_junit(tmp_path / "r.xml")
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert gpu.read_junit(tmp_path / "absent.xml")["missing"]


def test_tests_whose_package_is_missing_are_left_out():
    found = gpu.tests_that_need(["hypothesis"])
    assert "tests/operators/test_drawn_shapes.py" in found
    assert "tests/bench/test_bench_stats.py" not in found
    assert gpu.tests_that_need([]) == []


def test_every_file_under_results_is_one_that_can_be_read():
    for path in sorted((Path(gpu.ROOT) / "bench" / "results").rglob("*.json")):
        assert json.loads(path.read_text())["commit"]
        results.read(path)
