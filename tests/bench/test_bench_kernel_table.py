"""If these fail, the kernel table leaves out a rival, spends its time on what matters less, or hides a loss."""

import json

import pytest
import torch

import stf_kernels
from bench import goals, kernels, plan, rivals
from bench.operands import Operands
from bench.problems import SMALL, build_projector
from bench.providers import compiled_provider, providers, with_backward

DEFAULTS = kernels.parse([])
STEPS = plan.plan(DEFAULTS.stage, DEFAULTS.batch, DEFAULTS.dtype)


def operands(batch=2, *, grad=False):
    projector = build_projector(SMALL, stf_kernels.CompactTokenProjector, device="cpu", dtype=torch.float32, seed=1)
    made = Operands(projector.requires_grad_(False), SMALL, batch, device="cpu", dtype=torch.float32)
    if grad:
        made.require_grad()
    return made


def test_the_chain_at_the_goals_batches_comes_first_against_every_rival():
    first = STEPS[:6]
    assert {(s.stage, s.dtype) for s in first} == {("chain", "bfloat16")}
    assert {(s.run, s.batch, s.part) for s in first} == {
        *((run, batch, "paths") for run in plan.PASSES for batch in (1, 8)),
        *(("forward", batch, "compile-tma") for batch in (1, 8)),
    }


def test_every_step_is_there_once():
    everything = {
        (s, b, d, r) for s in plan.STAGES for b in (1, 2, 4, 8, 16, 32, 64) for d in ("bfloat16", "float16")
        for r in plan.PASSES
    }  # fmt: skip
    for part in ("paths", *plan.COMPILED):
        assert {(s.stage, s.batch, s.dtype, s.run) for s in STEPS if s.part == part} == everything
    assert {(s.stage, s.run) for s in STEPS if s.part == "own"} == {(s, "forward") for s in plan.STAGES}
    assert len(set(STEPS)) == len(STEPS)
    assert not any(s.part in plan.COMPILED for s in plan.plan(plan.STAGES, [3], ["float32"], compiled=False))


def test_the_rivals_of_every_stage():
    found = {stage: {p.name for p in providers(stage, operands())} for stage in plan.STAGES}
    assert found["G1"] >= {"eager", "stf", "strided", "addmm_activation"}
    assert found["G3"] >= {"eager", "stf", "conv2d", "addmm_activation"}
    assert found["chain"] >= {"eager", "stf", "strided", "conv2d", "addmm_activation"}


@pytest.mark.parametrize("stage", plan.STAGES)
def test_a_backward_is_compared_in_every_gradient(stage):
    """One wrong gradient of a provider shows, whichever it is."""
    made = operands(grad=True)
    exact = made.exact(stage, backward=True)
    count = {"chain": 8, "G1": 2}.get(stage, 3)  # of the tower's blocks there is none
    found = with_backward(providers(stage, made), stage, made)
    assert {"eager", "stf"} <= {p.name for p in found}
    for provider in found:
        gradients = provider.call()
        assert len(gradients) == count
        torch.testing.assert_close(provider.layout(gradients), exact, rtol=1e-3, atol=1e-3)
        for i in range(count):
            wrong = [g * 1.5 if i == j else g for j, g in enumerate(gradients)]
            assert (provider.layout(wrong) - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("name", plan.COMPILED)
def test_a_compiled_rival_is_one_piece_and_chooses_from_what_its_name_says(monkeypatch, name):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    made = operands()
    for stage in ("chain", "G3"):
        torch.testing.assert_close(compiled_provider(name, stage, made).call(), made.eager(stage))
    for options in seen:
        assert options["fullgraph"]
        assert options["options"]["max_autotune"]
        assert options["options"].get("triton.enable_persistent_tma_matmul", False) == (name == "compile-tma")
        assert set(options["options"]) <= set(torch._inductor.list_options())


def test_what_cannot_be_captured_is_timed_as_it_is(monkeypatch):
    import fake_cuda

    from bench import coldtime

    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(coldtime, "capture", refuse)
    times = coldtime.time_call(lambda: torch.ones(3) + 1, "cuda", lambda: None, seconds=0.1)
    assert times.us is None
    assert times.not_captured == "not captured: operation not permitted when stream is capturing"
    assert times.us_eager > 0


def row(provider, us, batch=1, error=2e-3):
    return {"stage": "chain", "dtype": "bfloat16", "pass": "forward", "batch": batch, "provider": provider, "us": us,
            "rel_error": error}  # fmt: skip


def test_losses_are_said_as_they_are():
    rows = [row("stf", 200.0), row("eager", 190.0), row("compile", 198.0), row("stf-pdl", 1.0)]
    [said] = goals.standing({"device": "NVIDIA H200", "rows": rows})
    assert "200.0 us" in said
    assert "milestone 190 MISSED, goal 155 MISSED" in said
    assert "compile 0.99x, eager 0.95x" in said
    assert "best rival (eager) MISSED" in said
    assert "error no larger than eager's reached" in said
    assert "1.03x over eager" not in said  # a goal from batch 8 on


def test_other_devices_have_ratios_and_no_goal_in_microseconds():
    rows = [row("stf", 100.0, 8, 3e-3), row("eager", 104.0, 8), row("stf", None, 2)]
    [said] = goals.standing({"device": "NVIDIA A100", "rows": rows})
    assert "milestone" not in said
    assert "1.03x over eager reached" in said
    assert "error no larger than eager's MISSED" in said


def training(provider, us, batch, peak):
    return {**row(provider, us, batch), "pass": "forward+backward", "peak_mb": peak}


def test_the_standing_of_a_training_step():
    """Its time against eager, and whether the bytes of concatenation and unfold are really not there."""
    avoided = 8 * 576 * 9 * 1024 * 2 / 2**20
    for saved, word in ((avoided, "reached"), (avoided - 1, "MISSED")):
        rows = [training("stf", 100.0, 8, 500.0), training("eager", 103.0, 8, 500.0 + saved)]
        [said] = goals.standing({"device": "NVIDIA H200", "sizes": "llava-1.5-7b", "rows": rows})
        assert "1.03x over eager; 1.00x reached, goal 1.05x MISSED" in said
        assert said.endswith(f"concatenation and unfold, 81 MB, {word}")


def test_rows_have_a_peak(tmp_path):
    path = tmp_path / "kernels.json"
    assert kernels.main(["--small", "--stage", "chain", "--batch", "1", "--dtype", "float32", "--no-compile",
                         "--json", str(path)]) == 0  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    peaks = {(r["pass"], r["provider"]): r["peak_mb"] for r in rows}
    assert peaks["forward+backward", "stf"] > peaks["forward", "stf"] > 0


def test_only_own_kernels_are_warmed(monkeypatch):
    called = []

    class Provider:
        def __init__(self, name):
            self.name = name

        def call(self):
            called.append(self.name)
            raise RuntimeError("does not run here")

    monkeypatch.setattr(kernels, "of_step", lambda step, operands: [Provider("eager"), Provider("stf")])
    assert kernels.main(["--small", "--warm", "--stage", "G2", "--batch", "1", "--dtype", "float32"]) == 0
    assert called
    assert set(called) == {"stf"}
    assert rivals.rivals_of("G2") == []
