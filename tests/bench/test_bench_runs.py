"""If this fails, `make prefill`, the kernel table or `make gpu` does not run, or reports what it should refuse."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_tests, group, kernels, prefill, processes, report, results, terminal
from bench.models import build_stock, preset_of
from bench.modes import Eager
from bench.presets import PRESETS
from bench.roofline import Ceilings
from bench.speedup import label
from bench.stages import STAGES
from llava_integration.modeling import LlavaStfModel

TINY = ["--preset", "tiny", "--device", "cpu", "--batch", "1"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """All rows, and what ran in each: the projector's package, tower layers, ways of insertion."""
    path = tmp_path_factory.mktemp("run") / "prefill.json"
    ran = {}
    run = Eager.run

    def spy_run(self):
        model = self.row.activate()
        seen = ran.setdefault(self.row.name, {"projector": set(), "layers": set(), "writes": set()})
        with pytest.MonkeyPatch.context() as patch:
            projector = model.model.multi_modal_projector
            seen["projector"].add(type(getattr(projector, "stf", projector)).__module__.split(".")[0])
            layers = spy_on_layers(patch, model)
            spy_on_writes(patch, seen["writes"])
            times = run(self)
        seen["layers"].add(sum(layers))
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Eager, "run", spy_run)
        status = prefill.main([*TINY, "--full", "--rounds", "3", "--decode", "2", "--json", str(path)])
    return status, results.read(path), ran, path


def spy_on_layers(patch, model):
    """A list that grows by one with each tower layer that runs."""
    calls = []
    for layer in model.model.vision_tower.encoder.layers:
        forward = layer.forward
        patch.setattr(layer, "forward", lambda *a, f=forward, **k: calls.append(1) or f(*a, **k))
    return calls


def spy_on_writes(patch, seen):
    insert, write = LlavaStfModel._insert_images, LlavaStfModel._write_images
    patch.setattr(LlavaStfModel, "_insert_images", lambda *a: seen.add("plain") or insert(*a))
    patch.setattr(LlavaStfModel, "_write_images", lambda *a: seen.add("in place") or write(*a))


def test_six_rows_are_measured_and_agree(full_run):
    status, result = full_run[:2]
    assert status == 0
    assert result["complete"]
    assert [(r["model"], r["projector"], r["image_tokens"]) for r in result["rows"]] == [
        ("llava-1.5", "mlp2x", 16), ("llava-1.5-skip", "mlp2x", 16), ("llava-1.5-pool", "mlp2x", 4),
        ("llava-stf", "reference", 4), ("llava-stf", "fused", 4), ("llava-stf", "fused", 4),
    ]  # fmt: skip
    assert len(result["checks"]) == 7
    assert all(check["agrees"] for check in result["checks"])
    assert len(result["speedup"]) == 5
    assert "llava-stf/fused+savings eager over llava-1.5/mlp2x eager, batch 1, text 8" in result["speedup"]


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
        assert row["shares"]["projector_ms"] == row["projector_share"]
        # Medians of stages over the median of totals: on a busy machine their sum need not be near 1.
        assert row["shares"] == {stage: row[stage] / row["total_ms"] for stage in STAGES}
        assert row["floor_ms"]["total_ms"] > 0
    kv = {row["image_tokens"]: row["kv_mb"] for row in full_run[1]["rows"]}
    # 2 (keys, values) * 2 layers * tokens * 64 channels * 4 bytes
    assert kv[16] * 2**20 == 2 * 2 * (16 + 8) * 64 * 4
    assert kv[4] * 2**20 == 2 * 2 * (4 + 8) * 64 * 4


def test_a_checkpoint_takes_the_place_of_a_preset(tmp_path):
    sizes = dataclasses.replace(PRESETS["tiny"], kv_heads=2, head_dim=8)
    stock = build_stock(sizes, device="cpu", dtype=torch.float32, seed=5)
    stock.save_pretrained(tmp_path / "small-llava")
    arguments = ["--model", str(tmp_path / "small-llava"), "--device", "cpu", "--rounds", "1", "--text", "5"]
    assert prefill.main([*arguments, "--json", str(tmp_path / "x.json"), "--report", str(tmp_path)]) == 0
    result = results.read(tmp_path / "x.json")
    assert (result["preset"], result["weights"].split(",")[0]) == ("small-llava", "small-llava")
    assert {row["text_tokens"] for row in result["rows"]} == {5}
    assert len(result["speedup"]) == 2
    assert "small-llava" in (tmp_path / "report.html").read_text()
    found = preset_of(tmp_path / "small-llava")
    assert dataclasses.replace(found, name="tiny", text_tokens=8, image_token=None) == sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_layer": [-2, -5]}, "expected vision_feature_layer -2"),
        ({"vision_feature_select_strategy": "full"}, "expected vision_feature_layer -2"),
        ({"text_config": 3}, "text_config"),
        ({"vision_config": {"image_size": 70, "patch_size": 14}}, "a grid that 2x2 windows divide"),
        (None, "cannot be loaded"),
    ],
)
def test_half_a_checkpoint_is_an_error_without_a_traceback(change, words, tmp_path, capsys):
    stock = build_stock(PRESETS["tiny"], device="cpu", dtype=torch.float32, seed=5)
    stock.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if change is None:
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--json", str(tmp_path / "x.json")]
    assert prefill.main(arguments) == 2
    error = capsys.readouterr().err
    assert "error: --model:" in error
    assert words in error


def test_each_row_runs_what_it_says_and_the_stopwatch_changes_nothing(full_run):
    ran = full_run[2]
    stf = {name.removeprefix("llava-stf/"): seen for name, seen in ran.items() if name.startswith("llava-stf/")}
    assert stf == {
        "reference": {"projector": {"reference"}, "layers": {24}, "writes": {"plain"}},
        "fused": {"projector": {"stf_kernels"}, "layers": {24}, "writes": {"plain"}},
        "fused+savings": {"projector": {"stf_kernels"}, "layers": {23}, "writes": {"in place"}},
    }


def test_savings_are_named_where_there_are_any_and_lower_the_floor(full_run):
    result = full_run[1]
    rows = {label(row): row for row in result["rows"]}
    assert {name: len(row["savings"]) for name, row in rows.items()} == {
        "llava-1.5/mlp2x": 0, "llava-1.5-skip/mlp2x": 1, "llava-1.5-pool/mlp2x": 0, "llava-stf/reference": 0,
        "llava-stf/fused": 0, "llava-stf/fused+savings": 3,
    }  # fmt: skip
    assert rows["llava-stf/fused+savings"]["savings"] == list(result["savings_mean"])
    vision = {name: row["floor_ms"]["vision_ms"] for name, row in rows.items()}
    assert vision["llava-stf/fused"] == vision["llava-stf/reference"] == vision["llava-1.5/mlp2x"]
    assert vision["llava-stf/fused+savings"] == vision["llava-1.5-skip/mlp2x"] < vision["llava-stf/fused"]


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
    # Room for one image of a sequence and not for 256: those are never tried.
    room = PRESETS["tiny"].memory_bytes(1, 8, 4) + (1 << 20)
    monkeypatch.setattr("bench.memory.available_bytes", lambda device: room)
    assert PRESETS["tiny"].activation_bytes(1, 8, 4, 256) > room
    assert prefill.main([*TINY, "--images", "256", "1", "--rounds", "1", "--json", str(path)]) == 0
    *too_large, first, second, third = results.read(path)["rows"]
    assert [row["image_tokens"] for row in too_large] == [256 * 16, 256 * 4, 256 * 4]
    assert all("does not fit into memory (about" in row["failed"] for row in too_large)  # from its numbers
    assert "does not fit into memory (no room" in first["failed"]  # as the device said
    assert first["total_ms"] is None
    assert second["total_ms"] > 0
    assert third["total_ms"] > 0
    assert results.read(path)["speedup"] == {}  # nothing to compare with


def test_a_row_that_breaks_costs_only_itself_and_the_exit_code(monkeypatch, tmp_path, capsys):
    """An operator that fails on a new GPU must not take the baseline's figures with it, nor pass for success."""
    output = Eager.output

    def broken(self):
        if self.row.name == "llava-stf/fused":
            raise RuntimeError("an illegal instruction")
        return output(self)

    monkeypatch.setattr(Eager, "output", broken)
    path = tmp_path / "prefill.json"
    assert prefill.main([*TINY, "--rounds", "1", "--json", str(path)]) == 1
    rows = {(row["model"], row["projector"]): row for row in results.read(path)["rows"]}
    assert rows["llava-stf", "fused"]["failed"].startswith("eager does not work here (RuntimeError: an illegal")
    assert rows["llava-1.5", "mlp2x"]["total_ms"] > 0
    assert rows["llava-stf", "reference"]["total_ms"] > 0
    assert "an illegal instruction" in capsys.readouterr().err


def test_the_terminal_names_the_speed_ups_that_may_be_noise(full_run):
    printed = terminal.report(full_run[1])  # of three rounds
    notes = [line for line in printed.splitlines() if line.startswith("note: fewer than 4 rounds")]
    assert len(notes) == 1
    assert all(f"{label(row)} eager" in notes[0] for row in full_run[1]["rows"][1:])


def test_a_size_that_cannot_fit_is_refused_from_its_numbers(monkeypatch, capsys):
    monkeypatch.setattr("bench.memory.available_bytes", lambda device: 1 << 30)
    monkeypatch.setattr("bench.models.build_stock", lambda *_, **__: pytest.fail("loaded all the same"))
    assert prefill.main(["--preset", "13b", "--device", "cpu", "--batch", "8", "2"]) == 2
    assert re.search(r"--preset: '13b' at batch 2 needs about \d+\.\d GiB", capsys.readouterr().err)


def test_points_that_the_budget_does_not_reach_are_said(tmp_path):
    path = tmp_path / "prefill.json"
    arguments = [*TINY, "--text", "5", "6", "--rounds", "1", "--budget", "0.001", "--json", str(path)]
    assert prefill.main(arguments) == 0
    result = results.read(path)
    assert {row["text_tokens"] for row in result["rows"]} == {5}
    assert result["complete"] is False
    assert any("6 text tokens" in note and "not measured" in note for note in result["notes"])


def test_a_sweep_changes_one_thing_at_a_time():
    args = prefill.parse(["--sweep"])
    args.preset = PRESETS["7b"]
    points = prefill.points(args)
    assert points[0] == (1, 64, 1)
    assert len(points) == len(set(points)) == 6 + 2 + 2
    assert {batch for batch, _, _ in points} == {1, 2, 4, 8, 16, 32}
    assert all(sum(value != first for value, first in zip(p, points[0], strict=True)) <= 1 for p in points)
    args = prefill.parse(["--batch", "1", "8", "--images", "1", "4"])
    args.preset = PRESETS["7b"]
    assert prefill.points(args) == [(1, 64, 1), (1, 64, 4), (8, 64, 1), (8, 64, 4)]


def test_two_runs_are_compared_row_by_row(full_run, tmp_path, capsys):
    path = tmp_path / "again.json"
    assert prefill.main([*TINY, "--rounds", "4", "--json", str(path)]) == 0
    capsys.readouterr()
    assert report.main(["--compare", str(full_run[3]), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("too few rounds") for line in lines) == 3 + 2  # three rounds there, four here
    assert report.main(["--compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("within noise") == 3 + 2  # rows and speed-ups, against themselves


def test_the_ceilings_of_a_busy_cpu_are_the_best_of_the_run(monkeypatch, tmp_path):
    measured = iter([1e3, 2e3, 5e3, 3e3])
    monkeypatch.setattr("bench.roofline.measure_ceilings", lambda *_: Ceilings(next(measured), 1e18, 1.0, "made up"))
    path = tmp_path / "prefill.json"
    assert prefill.main([*TINY, "--rounds", "3", "--json", str(path)]) == 0
    result = results.read(path)
    assert result["ceilings"]["flops"] == 5e3
    assert result["rows"][0]["floor_ms"]["vision_ms"] > 1e3  # from such ceilings
    assert any("of its floor" in note for note in result["notes"])


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
    assert stages == {(s, run) for s in kernels.STAGES for run in ("forward", "forward+backward")}
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

    monkeypatch.setattr("bench.rivals._conv2d", absent)
    path = tmp_path / "kernels.json"
    arguments = ["--small", "--no-compile", "--batch", "1", "--dtype", "float32", "--stage", "G3", "--json", str(path)]
    assert kernels.main(arguments) == 0
    rows = {row["provider"]: row for row in results.read(path)["rows"]}
    assert "no convolution here" in rows["conv2d"]["failed"]
    assert rows["stf"]["us_eager"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run there")
@pytest.mark.parametrize("how", ["interrupted", "out of time"])
def test_a_kernel_table_that_ends_early_keeps_its_rows(how, monkeypatch, tmp_path):
    original, rows = kernels.Bench.row, []

    def two(self, *arguments):
        if len(rows) == 2:
            raise KeyboardInterrupt
        original(self, *arguments)
        rows.append(arguments)
        if how == "out of time" and len(rows) == 2:
            self.until = 0.0

    monkeypatch.setattr(kernels.Bench, "row", two)
    path = tmp_path / "kernels.json"
    arguments = ["--small", "--no-compile", "--batch", "1", "--dtype", "float32", "--stage", "G3", "--json", str(path)]
    assert kernels.main(arguments) == (130 if how == "interrupted" else 0)
    result = results.read(path)
    assert len(result["rows"]) == 2
    assert result["complete"] is False
    assert result["rows"][0]["provider"] == "eager"
    assert any("out of time" in note for note in result["notes"]) == (how == "out of time")


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


def test_every_file_under_results_is_one_that_can_be_read():
    for path in sorted((Path(gpu.ROOT) / "bench" / "results").rglob("*.json")):
        assert json.loads(path.read_text())["commit"]
        results.read(path)
