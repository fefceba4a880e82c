"""If this fails, the kernel table leaves out a rival, times a wrong kernel, hides a loss or loses rows."""

from contextlib import nullcontext

import pytest
import torch
from support.sample_results import kernel_row

import stf_kernels
from bench import results
from bench.kernels import providers, run, table
from bench.kernels.__main__ import STAGES, main, parse, steps
from bench.kernels.problems import SMALL, Operands, flat

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it would run there")
ARGUMENTS = ["--small", "--no-compile", "--batch", "1", "--dtype", "float32"]


def measured(tmp_path, *arguments):
    """(exit code, provider -> row)"""
    path = tmp_path / "kernels.json"
    status = main([*ARGUMENTS, *arguments, "--json", str(path)])
    return status, results.read(path)


def test_the_table_runs_small_and_its_rows_agree(tmp_path):
    status, result = measured(tmp_path)
    assert (status, result["complete"]) == (0, True)
    ours = {(row["stage"], row["pass"]) for row in result["rows"] if row["provider"] == "stf"}
    assert ours == {("chain", "forward+backward"), *((stage, "forward") for stage in STAGES)}
    assert all(row["rel_error"] <= row["allowed_error"] for row in result["rows"])
    peaks = {row["pass"]: row["peak_mb"] for row in result["rows"] if row["provider"] == "stf"}
    assert peaks["forward+backward"] > peaks["forward"] > 0


def test_the_order_of_the_steps_and_the_rivals_of_every_stage():
    found = steps(parse([]))
    assert (found[0].stage, found[0].batch, found[0].dtype, found[0].run) == ("chain", 1, "bfloat16", "forward")
    assert [step.slow for step in found] == [False] * 84 + [True] * 84  # what torch.compile builds comes last
    assert len(set(found)) == 2 * 2 * 7 * 6
    assert not any(step.slow for step in steps(parse(["--no-compile"])))
    found = {stage: {*providers.of_stage(stage)} - {"eager", "stf"} for stage in STAGES}
    assert found["concat"] == {"strided", "addmm_activation"}
    assert found["linear"] == {"stf-merge_in", "conv2d", "addmm_activation"}
    assert found["chain"] == {"strided", "conv2d", "addmm_activation"}
    assert found["linear_merge"] == found["linear_scatter"] == set()
    assert "stf-triton" in providers.of_stage("chain", gpu=True)
    assert found["chain"] - set(providers.of_stage("chain", trains=True)) == {"addmm_activation"}


def test_a_backward_is_compared_in_every_gradient():
    """One wrong gradient of a provider shows, whichever it is."""
    operands = Operands(SMALL, 2, device="cpu", dtype=torch.float32)
    operands.projector.requires_grad_(True)
    exact, sizes = operands.exact("chain", gradients=True), [p.numel() for p in operands.projector.parameters()]
    for name, provider in providers.of_stage("chain", trains=True).items():
        gradients = flat(operands.gradients(provider.call(operands, "chain")))
        torch.testing.assert_close(gradients, exact.float(), rtol=1e-3, atol=1e-3, msg=name)
        for part in gradients.split(sizes):
            assert part.norm() > 1e-3 * exact.norm()  # an error of one half of it would exceed any bound


@pytest.mark.parametrize("name", ["compile", "compile-tma"])
def test_a_compiled_rival_is_one_piece_and_chooses_from_what_its_name_says(monkeypatch, name):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    operands = Operands(SMALL, 2, device="cpu", dtype=torch.float32)
    for stage in ("chain", "linear"):
        call = providers.of_stage(stage, slow=True)[name].call(operands, stage)
        torch.testing.assert_close(call(), operands.eager(stage, operands.inputs[stage]))
    for options in seen:
        assert options["fullgraph"]
        assert options["options"]["max_autotune"]
        assert options["options"].get("triton.enable_persistent_tma_matmul", False) == (name == "compile-tma")
        assert set(options["options"]) <= set(torch._inductor.list_options())


def test_a_wrong_kernel_gets_no_time_and_a_rival_that_does_not_run_costs_only_its_own_row(monkeypatch, tmp_path):
    def absent(*_):
        raise RuntimeError("no convolution here")

    right = stf_kernels.spatial_merge_linear
    monkeypatch.setattr(stf_kernels, "spatial_merge_linear", lambda *a, **k: right(*a, **k) * 1.001)
    monkeypatch.setitem(providers.PROVIDERS, "conv2d", providers.Provider(absent, ("linear",)))
    status, result = measured(tmp_path, "--stage", "linear")
    rows = {row["provider"]: row for row in result["rows"]}
    assert status == 1
    assert "wrong" in rows["stf-merge_in"]["failed"]
    assert rows["stf-merge_in"]["us_eager"] is None
    assert "no convolution here" in rows["conv2d"]["failed"]
    assert rows["stf"]["us_eager"] > 0


@pytest.mark.parametrize("how", ["interrupted", "out of time"])
def test_a_table_that_ends_early_keeps_its_rows(how, monkeypatch, tmp_path):
    fill, filled = run.Run.fill, []

    def two(self, *arguments):
        if len(filled) == 2:
            raise KeyboardInterrupt
        fill(self, *arguments)
        filled.append(arguments)
        self.until = 0.0 if how == "out of time" and len(filled) == 2 else self.until

    monkeypatch.setattr(run.Run, "fill", two)
    with pytest.raises(KeyboardInterrupt) if how == "interrupted" else nullcontext():
        assert measured(tmp_path, "--stage", "linear", "concat")[0] == 0
    result = results.read(tmp_path / "kernels.json")
    assert not result["complete"]
    assert [row["provider"] for row in result["rows"]] == ["eager", "stf"]
    assert any("--budget SECONDS raises it" in note for note in result["notes"]) == (how == "out of time")


def test_losses_are_said_as_they_are():
    rows = [kernel_row("stf", 200.0), kernel_row("eager", 190.0), kernel_row("compile", 180.0)]
    rows += [kernel_row("stf-triton", 1.0), kernel_row("stf", None, 8, us_eager=None, failed="wrong")]
    said = "chain forward, batch 1, bfloat16: 200.0 us, 0.95x over eager, 0.90x over the best rival, compile"
    assert table.standing(rows) == [said]
    assert [cells["vs eager"] for cells in table.cells(rows)] == ["0.95x", "1.00x", "1.06x", "190.00x", "-"]
