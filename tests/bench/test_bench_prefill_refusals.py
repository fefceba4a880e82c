"""If this fails, `make prefill` reports what it should refuse, or loses what it measured when something ends it."""

import json
import re

import pytest
import torch

from bench import group, prefill, results
from bench.models import build_stock
from bench.modes import Eager
from bench.presets import PRESETS
from bench.roofline import Ceilings


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


def test_a_size_that_cannot_fit_is_refused_from_its_numbers(monkeypatch, capsys):
    monkeypatch.setattr("bench.memory.available_bytes", lambda device: 1 << 30)
    monkeypatch.setattr("bench.models.build_stock", lambda *_, **__: pytest.fail("loaded all the same"))
    assert prefill.main(["--preset", "13b", "--device", "cpu", "--batch", "8", "2"]) == 2
    assert re.search(r"--preset: '13b' at batch 2 needs about \d+\.\d GiB", capsys.readouterr().err)


def test_no_speed_up_when_fused_and_reference_differ(monkeypatch, tmp_path, capsys, tiny):
    original = Eager.output

    def wrong(self):
        output = original(self)
        if self.row.name == "llava-stf/fused":
            output.features = output.features * 1.01
        return output

    monkeypatch.setattr(Eager, "output", wrong)
    path = tmp_path / "prefill.json"
    assert prefill.main([*tiny, "--rounds", "1", "--json", str(path)]) == 1
    result = results.read(path)
    assert result["speedup"] == {}
    assert result["comparisons"] == []
    assert "image features, llava-stf/fused" in result["refused"]
    printed = capsys.readouterr().out
    assert "NO SPEED-UP IS REPORTED" in printed
    assert not re.search(r"\d\.\d\dx", printed)


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path, tiny):
    original = group.Group.round

    def interrupted(self, index):
        if index == 2:
            raise KeyboardInterrupt
        original(self, index)

    monkeypatch.setattr(group.Group, "round", interrupted)
    path = tmp_path / "prefill.json"
    assert prefill.main([*tiny, "--rounds", "5", "--json", str(path)]) == 130
    result = results.read(path)
    assert result["complete"] is False
    assert {row["rounds"] for row in result["rows"]} == {2}


def test_a_row_that_does_not_fit_says_so_and_the_rest_goes_on(monkeypatch, tmp_path, tiny):
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
    assert prefill.main([*tiny, "--images", "256", "1", "--rounds", "1", "--json", str(path)]) == 0
    *too_large, first, second, third = results.read(path)["rows"]
    assert [row["image_tokens"] for row in too_large] == [256 * 16, 256 * 4, 256 * 4]
    assert all("does not fit into memory (about" in row["failed"] for row in too_large)  # from its numbers
    assert "does not fit into memory (no room" in first["failed"]  # as the device said
    assert first["total_ms"] is None
    assert second["total_ms"] > 0
    assert third["total_ms"] > 0
    assert results.read(path)["speedup"] == {}  # nothing to compare with


def test_a_row_that_breaks_costs_only_itself_and_the_exit_code(monkeypatch, tmp_path, capsys, tiny):
    """An operator that fails on a new GPU must not take the baseline's figures with it, nor pass for success."""
    output = Eager.output

    def broken(self):
        if self.row.name == "llava-stf/fused":
            raise RuntimeError("an illegal instruction")
        return output(self)

    monkeypatch.setattr(Eager, "output", broken)
    path = tmp_path / "prefill.json"
    assert prefill.main([*tiny, "--rounds", "1", "--json", str(path)]) == 1
    rows = {(row["model"], row["projector"]): row for row in results.read(path)["rows"]}
    assert rows["llava-stf", "fused"]["failed"].startswith("eager does not work here (RuntimeError: an illegal")
    assert rows["llava-1.5", "mlp2x"]["total_ms"] > 0
    assert rows["llava-stf", "reference"]["total_ms"] > 0
    assert "an illegal instruction" in capsys.readouterr().err


def test_points_that_the_budget_does_not_reach_are_said(tmp_path, tiny):
    path = tmp_path / "prefill.json"
    arguments = [*tiny, "--text", "5", "6", "--rounds", "1", "--budget", "0.001", "--json", str(path)]
    assert prefill.main(arguments) == 0
    result = results.read(path)
    assert {row["text_tokens"] for row in result["rows"]} == {5}
    assert result["complete"] is False
    assert any("6 text tokens" in note and "not measured" in note for note in result["notes"])


def test_rounds_stop_at_the_budget(monkeypatch):
    class Slow:
        measurable, taken = True, 0

        def round(self, index):
            self.taken += 1

    slow = Slow()
    assert group.take_rounds(slow, fewest=2, most=9, until=0.0) == 2
    assert group.take_rounds(slow, fewest=2, most=9, until=float("inf")) == 9
    assert slow.taken == 11


def test_the_ceilings_of_a_busy_cpu_are_the_best_of_the_run(monkeypatch, tmp_path, tiny):
    measured = iter([1e3, 2e3, 5e3, 3e3])
    monkeypatch.setattr("bench.roofline.measure_ceilings", lambda *_: Ceilings(next(measured), 1e18, 1.0, "made up"))
    path = tmp_path / "prefill.json"
    assert prefill.main([*tiny, "--rounds", "3", "--json", str(path)]) == 0
    result = results.read(path)
    assert result["ceilings"]["flops"] == 5e3
    assert result["rows"][0]["floor_ms"]["vision_ms"] > 1e3  # from such ceilings
    assert any("of its floor" in note for note in result["notes"])
