"""If this fails, `bench.host` compares us with the reference unfairly, or loses what it measured."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench import host, results
from bench.command import BadInput
from tests.launch import recording_driver

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run there")
HOST_ROWS = ["concat_linear", "spatial_merge_linear", "chain", "chain forward+backward"]


def test_the_sides_take_turns():
    """On a machine that is slower with every call neither side is the later one."""
    asked, clock = [], itertools.count(1)
    times = host.in_turns(lambda side: asked.append(side) or next(clock), ("ours", "theirs"), 4)
    assert asked == ["ours", "theirs", "theirs", "ours"] * 2
    assert times == [(1, 2), (4, 3), (5, 6), (8, 7)]
    found = host.row("it", [(1.0, 2.0), (1.0, 5.0), (2.0, 6.0)])
    assert found == {"what": "it", "us": 1e6, "reference_us": 5e6, "ratio": 3.0, "min": 2.0, "max": 5.0}


def test_without_a_gpu_ours_are_launched_on_a_recording_driver(monkeypatch):
    if recording_driver.COMPILER is None:
        assert host.recorded() is None
        pytest.skip("no C compiler, which Triton's launcher needs, too")
    found = host.recorded()
    assert [row["what"] for row in found["rows"]] == HOST_ROWS
    assert found["stage"]["us"] > 0 < found["stage"]["driver_us"]
    assert found["launches"] == 4, "not the kernels, then"
    monkeypatch.setattr(recording_driver, "COMPILER", None)
    assert host.recorded() is None


def test_both_tables_and_their_file(monkeypatch, tmp_path, capsys):
    """The first in plain torch, by a pretended clock; the second of a toy, whose gradients count as memory."""

    class Timer:
        def __init__(self, _, globals, **__):
            globals["call"]()

        def timeit(self, _):
            return SimpleNamespace(median=1e-6)

    monkeypatch.setattr("torch.utils.benchmark.Timer", Timer)
    monkeypatch.setattr(host, "recorded", lambda: None)
    monkeypatch.setattr(host, "SIZES", (8, 16, 64))
    monkeypatch.setattr(host, "TOKENS", 17)
    assert host.main(["--json", str(tmp_path / "host.json")]) == 0
    result = results.read(tmp_path / "host.json")
    assert result["complete"]
    assert [row["what"] for row in result["rows"]] == HOST_ROWS
    assert "stage" not in result
    assert "none: both in plain torch" in capsys.readouterr().out
    what = [f"projector {step}, batch {batch}" for batch in (1, 8) for step in ("forward", "training step")]
    assert [row["what"] for row in result["cpu"]] == what
    assert result["cpu"][1]["peak_mb"] > result["cpu"][0]["peak_mb"]
    for row in result["cpu"]:
        assert 0 < row["min"] <= row["ratio"] <= row["max"]
        assert row["cpu_ratio"] > 0
        assert row["peak_mb"] <= row["reference_peak_mb"]
    result["cpu"][0].pop("peak_mb")
    (tmp_path / "host.json").write_text(json.dumps(result))
    with pytest.raises(BadInput, match="peak_mb"):
        results.read(tmp_path / "host.json")
