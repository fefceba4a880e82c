"""If this fails, `make prefill` runs something else than its rows say, or reports what it should refuse; or a bad
option costs the user a model load before it is noticed."""

import json
import re

import pytest
import torch

from bench import results
from bench.command import BadInput
from bench.prefill import models, table
from bench.prefill.__main__ import PHOTOGRAPH, main, parse
from bench.prefill.modes import STAGES, Eager
from bench.prefill.presets import Point, preset, preset_of
from bench.prefill.table import label
from llava_integration.llava_stf import LlavaStfModel

TINY = ["--preset", "tiny", "--device", "cpu", "--batch", "1"]


@pytest.fixture
def tiny_run(tmp_path):
    """(exit code, result file) of a run of the smallest prefill."""

    def start(*arguments):
        status = main([*TINY, *arguments, "--json", str(tmp_path / "prefill.json")])
        return status, results.read(tmp_path / "prefill.json")

    return start


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """All rows, and what ran in each: the projector's package, tower layers, whether it wrote in place."""
    path, ran, measure = tmp_path_factory.mktemp("run") / "prefill.json", {}, Eager.run

    def spy_run(self):
        seen = ran.setdefault(self.row.name, {"projector": set(), "layers": set(), "in place": set()})
        with pytest.MonkeyPatch.context() as patch:
            projector, layers, writes = self.model.model.multi_modal_projector, [], []
            seen["projector"].add(type(getattr(projector, "stf", projector)).__module__.split(".")[0])
            for layer in self.model.model.vision_tower.encoder.layers:
                patch.setattr(layer, "forward", lambda *a, f=layer.forward, **k: layers.append(1) or f(*a, **k))
            write = LlavaStfModel._write_images
            patch.setattr(LlavaStfModel, "_write_images", lambda *a: writes.append(1) or write(*a))
            times = measure(self)
        seen["layers"].add(len(layers))
        seen["in place"].add(bool(writes))
        return times

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Eager, "run", spy_run)
        status = main([*TINY, "--full", "--rounds", "3", "--json", str(path)])
    return status, results.read(path), ran, path


def test_five_rows_are_measured_and_agree(full_run):
    status, result = full_run[:2]
    assert (status, result["complete"]) == (0, True)
    rows = [("llava-1.5/mlp2x", 16), ("llava-1.5-skip/mlp2x", 16), ("llava-1.5-pool/mlp2x", 4)]
    rows += [("llava-stf/reference", 4), ("llava-stf/fused", 4)]
    assert [(label(row), row["image_tokens"]) for row in result["rows"]] == rows
    assert len(result["checks"]) == 1 + 2 * 2  # the warm start; features and logits of two twins
    assert all(check["agrees"] for check in result["checks"])
    assert len(result["speedup"]) == 4
    assert "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 1, text 8" in result["speedup"]


def test_each_row_runs_what_it_says_and_the_stopwatch_changes_nothing(full_run):
    seen = full_run[2]
    for name, package in (("reference", "reference"), ("fused", "stf_kernels")):
        assert seen[f"llava-stf/{name}"] == {"projector": {package}, "layers": {24}, "in place": {False}}
    assert seen["llava-1.5/mlp2x"]["layers"] == seen["llava-1.5-pool/mlp2x"]["layers"] == {24}
    assert seen["llava-1.5-skip/mlp2x"]["layers"] == {23}


def test_every_row_has_times_memory_and_its_samples(full_run):
    rows = {label(row): row for row in full_run[1]["rows"]}
    for row in rows.values():
        assert row["rounds"] == len(row["samples"]["total_ms"]) == 3
        for index, total in enumerate(row["samples"]["total_ms"]):
            assert sum(row["samples"][stage][index] for stage in STAGES) == pytest.approx(total)
        assert row["peak_mb"] > row["weights_mb"] > 0
        assert row["projector_share"] == row["projector_ms"] / row["total_ms"]
        # 2 (keys, values) * 2 layers * tokens * 64 channels * 4 bytes
        assert row["kv_mb"] * 2**20 == 2 * 2 * (row["image_tokens"] + 8) * 64 * 4
    floors = {name: row["floor_ms"]["vision_ms"] for name, row in rows.items()}
    assert floors["llava-1.5-skip/mlp2x"] < floors["llava-stf/fused"] == floors["llava-1.5/mlp2x"]


def test_the_terminal_says_what_matters_first_and_how_to_get_more_rounds(full_run):
    result = full_run[1]  # of three rounds
    printed = table.report(result, full=False).splitlines()
    header = next(line for line in printed if line.startswith("model"))
    assert re.split(r"\s{2,}", header)[:4] == ["model", "image tokens", "total ms", "speed-up"]
    assert max(map(len, printed[: printed.index(header) + 7])) <= 120
    notes = [line for line in printed if "fewer than 4 rounds cannot tell it" in line and "--rounds 4" in line]
    assert all(label(row) in note for row, note in zip(result["rows"][1:], notes, strict=True))
    assert "peak MB" in table.report(result, full=True)


@pytest.mark.parametrize(
    ("family", "tiles", "tokens"), [("llava-next", 5, (16 + 6 * 9, 4 + 4 * 5)), ("llava-onevision", 21, (817, 97))]
)
def test_a_family_in_tiles_is_measured_as_its_users_call_it(family, tiles, tokens, tiny_run, capsys):
    """640x480 in 2x2 tiles of 56 pixels: 8 rows of tokens, 6 without padding; of windows 4, and none to cut."""
    status, result = tiny_run("--family", family, "--rounds", "1")
    assert (status, result["preset"], result["complete"]) == (0, f"tiny, {tiles} tiles", True)
    rows = [(label(row), row["image_tokens"]) for row in result["rows"]]
    assert rows == [(f"{family}/mlp2x", tokens[0]), (f"{family}-stf/fused", tokens[1])]
    assert [check["agrees"] for check in result["checks"]] == [True, True]
    assert list(result["speedup"]) == [f"{family}-stf/fused eager over {family}/mlp2x eager, batch 1, text 8"]
    assert all(row[stage] > 0 for row in result["rows"] for stage in ("vision_ms", "projector_ms", "prefill_ms"))
    assert str(tokens[1]) in capsys.readouterr().out


def test_a_checkpoint_takes_the_place_of_a_preset(tmp_path):
    folder, sizes = tmp_path / "small-llava", preset("tiny", num_key_value_heads=2)
    models.build_stock(sizes, device="cpu", dtype=torch.float32).save_pretrained(folder)
    arguments = ["--model", str(folder), "--device", "cpu", "--rounds", "1", "--text", "5"]
    assert main([*arguments, "--json", str(tmp_path / "x.json")]) == 0
    result = results.read(tmp_path / "x.json")
    assert (result["preset"], result["weights"].split(",")[0]) == ("small-llava", "small-llava")
    assert len(result["speedup"]) == 2
    assert preset_of(folder).attention_widths == (64, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_layer": [-2, -5]}, "expected vision_feature_layer -2"),
        ({"text_config": 3}, "text_config"),
        ({"model_type": "qwen2_vl"}, "expected a checkpoint of model_type 'llava', got 'qwen2_vl'"),
        ("{", "not a valid JSON"),
        ({"vision_config": {"image_size": 70, "patch_size": 14}}, "an even grid, got -2, 'default' and 5x5 patches"),
        (None, "cannot be loaded"),
    ],
)
def test_half_a_checkpoint_is_an_error_without_a_traceback(change, words, tmp_path):
    models.build_stock(preset("tiny"), device="cpu", dtype=torch.float32).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if change is None:
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        config.write_text(change if change == "{" else json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(BadInput, match=rf"^--model: (.|\n)*{words}"):
        main(["--model", str(tmp_path), "--device", "cpu", "--json", str(tmp_path / "x.json")])


def test_what_cannot_run_here_is_refused_before_it_is_loaded(monkeypatch):
    with pytest.raises(BadInput, match="'graph' needs a GPU"):
        main([*TINY, "--modes", "graph"])
    monkeypatch.setattr("bench.meters.available_bytes", lambda device: 1 << 30)
    monkeypatch.setattr("bench.prefill.models.build_stock", lambda *_, **__: pytest.fail("loaded all the same"))
    words = r"--preset: '13b' at batch 2 does not fit on cpu, about \d+\.\d GiB needed, 1\.0 GiB free; use a smaller"
    with pytest.raises(BadInput, match=words):
        main(["--preset", "13b", "--device", "cpu", "--batch", "8", "2"])


def patched_first_run(monkeypatch, name, change):
    """`change` of what the row `name` leaves; or the error that it ends in."""
    original = Eager.first_run

    def first_run(self):
        logits = original(self)
        if self.row.name == name:
            if isinstance(change, Exception):
                raise change
            change(self)
        return logits

    monkeypatch.setattr(Eager, "first_run", first_run)


def test_no_speed_up_when_fused_and_reference_differ(monkeypatch, capsys, tiny_run):
    patched_first_run(monkeypatch, "llava-stf/fused", lambda cell: setattr(cell, "features", cell.features * 1.01))
    status, result = tiny_run("--rounds", "1")
    assert (status, result["speedup"], result["comparisons"]) == (1, {}, [])
    assert "image features, llava-stf/fused" in result["refused"]
    printed = capsys.readouterr().out
    assert "NO SPEED-UP IS REPORTED" in printed
    assert not re.search(r"\d\.\d\dx", printed)


def test_a_row_that_breaks_or_does_not_fit_costs_only_itself_and_the_exit_code(monkeypatch, capsys, tiny_run):
    """An operator that fails on a new GPU must not take the others' figures with it, nor pass for success."""
    patched_first_run(monkeypatch, "llava-1.5/mlp2x", torch.OutOfMemoryError("no room"))
    patched_first_run(monkeypatch, "llava-stf/fused", RuntimeError("an illegal instruction"))
    # Room for one image of a sequence and not for 256: those are never tried.
    small, many = preset("tiny"), Point(1, 8, 256)
    room = small.weight_bytes(4) + small.activation_bytes(Point(1, 8), 4) + (1 << 20)
    assert small.activation_bytes(many, 4) > room
    monkeypatch.setattr("bench.meters.available_bytes", lambda device: room)
    status, result = tiny_run("--images", "256", "1", "--rounds", "1", "--budget", "10000")
    assert status == 1
    assert "an illegal instruction" in capsys.readouterr().err
    *too_large, first, second, third = result["rows"]
    assert [row["image_tokens"] for row in too_large] == [256 * 16, 256 * 4, 256 * 4]
    assert all("does not fit into memory" in row["failed"] and "needed" in row["failed"] for row in too_large)
    assert "no room" in first["failed"]  # as the device said
    assert first["total_ms"] is None
    assert second["total_ms"] > 0
    assert third["failed"].startswith("eager does not work here (RuntimeError: an illegal")
    assert result["speedup"] == {}  # nothing to compare with


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tiny_run, tmp_path):
    original, runs = Eager.run, []

    def interrupted(self):
        runs.append(self)
        if len(runs) == 7:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Eager, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_run("--rounds", "5")
    result = results.read(tmp_path / "prefill.json")
    assert result["complete"] is False
    assert {row["rounds"] for row in result["rows"]} == {2}
    # Interleaved: each round begins with another row.
    assert [cell.row.projector for cell in runs[:6]] == ["mlp2x", "reference", "fused", "reference", "fused", "mlp2x"]


def test_points_and_rounds_that_the_budget_does_not_reach_are_said(tiny_run):
    status, result = tiny_run("--text", "5", "6", "--budget", "0.001")
    assert status == 0
    assert {(row["text_tokens"], row["rounds"]) for row in result["rows"]} == {(5, 3)}  # the fewest that are taken
    notes = " ".join(result["notes"])
    assert (result["complete"], "text 6: not measured" in notes) == (False, True)
    assert "3 rounds fitted into the time budget, 6 were planned; --budget SECONDS or --rounds N" in notes


OPTIONS = [
    (["--preset", "70b"], "'70b'"),
    (["--image", "absent.jpg"], "No such file"),
    (["--image", "README.md"], "cannot be read as an image"),
    (["--image", "HALF"], "cannot be read as an image"),
    (["--json", "bench"], "is a folder"),
    (["--json", "/proc/prefill.json"], "cannot be written"),
    (["--batch", "0"], "at least 1"),
    (["--batch", "two"], "'two'"),
    (["--rounds", "-1"], "at least 1"),
    (["--budget", "nan"], "above 0"),
    (["--modes", "fast"], "'fast'"),
    (["--model", "absent"], "has no config.json"),
    (["--family", "qwen"], "'qwen'"),
    (["--family", "llava-onevision", "--preset", "13b"], "got '13b'"),
    (["--family", "llava-next", "--images", "2"], "got ['images']"),
]


@pytest.mark.parametrize(("arguments", "words"), OPTIONS, ids=str)
def test_bad_input_is_named_before_anything_is_loaded(arguments, words, tmp_path, capsys):
    """By `parse`, before torch is imported."""
    whole = PHOTOGRAPH.read_bytes()
    (half := tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match="2"):
        parse([str(half) if argument == "HALF" else argument for argument in arguments])
    said = capsys.readouterr().err
    assert arguments[0] in said
    assert words in said
