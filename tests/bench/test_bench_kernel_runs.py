"""If this fails, the kernel table does not run, times a wrong kernel, or loses its rows to one that fails."""

import pytest
import torch

from bench import kernels, results


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
