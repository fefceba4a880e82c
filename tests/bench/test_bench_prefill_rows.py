"""If this fails, a row of `make prefill` runs something else than its name says, or leaves out what it measured."""

import dataclasses

import pytest
import torch

from bench import prefill, report, results, terminal
from bench.models import build_stock, preset_of
from bench.modes import Eager
from bench.presets import PRESETS
from bench.speedup import label
from bench.stages import STAGES
from llava_integration.modeling import LlavaStfModel


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny):
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
        status = prefill.main([*tiny, "--full", "--rounds", "3", "--decode", "2", "--json", str(path)])
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


def test_the_terminal_names_the_speed_ups_that_may_be_noise(full_run):
    printed = terminal.report(full_run[1])  # of three rounds
    notes = [line for line in printed.splitlines() if line.startswith("note: fewer than 4 rounds")]
    assert len(notes) == 1
    assert all(f"{label(row)} eager" in notes[0] for row in full_run[1]["rows"][1:])


def test_two_runs_are_compared_row_by_row(full_run, tmp_path, capsys, tiny):
    path = tmp_path / "again.json"
    assert prefill.main([*tiny, "--rounds", "4", "--json", str(path)]) == 0
    capsys.readouterr()
    assert report.main(["--compare", str(full_run[3]), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("too few rounds") for line in lines) == 3 + 2  # three rounds there, four here
    assert report.main(["--compare", str(path), str(path)]) == 0
    assert capsys.readouterr().out.count("within noise") == 3 + 2  # rows and speed-ups, against themselves


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
