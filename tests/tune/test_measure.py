"""If these fail, the offline search times something else than what an entry of its table will say."""

from dataclasses import replace

import pytest
import torch

from stf_kernels.configs import GemmConfig
from stf_kernels.ops import tma
from stf_kernels.ops.weight_grad import has_one_row_stride
from stf_kernels.tune import measure
from stf_kernels.tune.candidates import candidates
from stf_kernels.tune.measure import ProblemBench
from stf_kernels.tune.problems import PROBLEMS

FAST = GemmConfig(128, 128, 64)


@pytest.fixture
def bench_of(monkeypatch):
    """ProblemBench of a problem by name, at few channels, drawn on the CPU."""
    generator, randn = torch.Generator, torch.randn
    # a class, because torch's own annotations name it when a module is first imported
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {"__new__": lambda cls, device: generator()}))
    monkeypatch.setattr(torch, "randn", lambda shape, device, generator: randn(shape, generator=generator))
    monkeypatch.setattr(measure, "Flush", lambda device: None)
    return lambda name, batch, c=16: ProblemBench(replace(PROBLEMS[name], c=c, n=24), torch.bfloat16, batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["concat", "linear_merge", "linear", "linear_scatter"])
def test_every_candidate_can_be_measured(bench_of, name, batch, monkeypatch):
    """On operands that no descriptor names a form would be given up, and never get into a table."""
    problem = PROBLEMS[name]
    bench = bench_of(name, batch, c=128)
    monkeypatch.setattr(tma, "device_has_tma", lambda device: True)
    for config in candidates(problem, batch * problem.tokens, 2, "sm_90", 132)[:24]:
        if config.form != "pointer":
            tma.layout_of(bench._blocks, bench._weight, problem.stage, config)  # or Refused


@pytest.mark.parametrize("name", ["concat_wgrad", "merge_wgrad"])
def test_a_weight_gradient_is_measured_against_the_library(bench_of, name, monkeypatch):
    """config None must be the library's sum over the same rows."""
    asked = []
    monkeypatch.setattr(measure.weight_grad, "launch_wgrad", lambda *a: asked.append(a) or a[0])
    bench = bench_of(name, 2)
    found = bench._run(None)
    rows = [segment.flatten(0, -2) for segment in PROBLEMS[name].stage.segments(bench._blocks)]
    torch.testing.assert_close(found, bench._g.t() @ torch.cat(rows, -1), rtol=2e-2, atol=2e-1)
    assert asked == []
    bench._run(FAST)
    assert asked[0][-1] == FAST


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_choice_is_measured_where_there_is_one(bench_of, name, batch):
    """One image's rows have one stride: no entry of a table for the weight gradient would ever be asked for."""
    problem, bench = PROBLEMS[name], bench_of(name, batch)
    copied = problem.stage.merge_in > 1 or not all(map(has_one_row_stride, bench._blocks))
    assert problem.has_choice(batch) == (not problem.wgrad or copied)


def test_a_tile_that_the_compiler_refuses_is_named_and_does_not_run(bench_of, monkeypatch, capsys):
    class Kernel:
        def warmup(self, *_, num_warps, **__):
            if num_warps == 8:
                raise RuntimeError("PassManager::run failed")

    bench, other = bench_of("concat", 1), replace(FAST, num_warps=8)
    monkeypatch.setitem(measure.launch.ARGUMENTS, "pointer", lambda *_: (Kernel(), (1,), (), (), {}))
    monkeypatch.setattr(measure, "capture", lambda call: call)
    monkeypatch.setattr(measure, "replay", lambda graph, flush, repeats: [7.0])
    monkeypatch.setattr(bench, "_run", lambda config: torch.ones(1))
    bench.compile([FAST, other])
    assert f"concat: {other} does not compile: PassManager" in capsys.readouterr().out
    assert bench.microseconds(other) is None
    assert bench.microseconds(FAST) == 7.0


def test_a_kernel_that_computes_something_else_ends_the_search(bench_of, monkeypatch):
    bench = bench_of("linear", 1)
    monkeypatch.setattr(measure.launch, "run_stage", lambda *_: (torch.ones(1, 144, 24), None))
    with pytest.raises(RuntimeError, match="linear: the kernel differs from the torch path"):
        bench.microseconds(FAST)
