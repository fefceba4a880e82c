"""If these fail, the offline search times something else than what an entry of its table will say."""

from dataclasses import replace

import pytest
import torch

from stf_kernels.ops.descriptors import layout_for
from stf_kernels.tune.problems import PROBLEMS
from stf_kernels.configs import GemmConfig, problem_bench
from stf_kernels.tune.candidates import candidates, forms_for
from stf_kernels.tune.measure import ProblemBench

CONCAT, FAST = PROBLEMS["concat"], GemmConfig(128, 128, 64)
HOPPER = {"shared_limit": 232_448, "multiprocessors": 132}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["concat", "linear_merge", "linear", "linear_scatter"])
def test_every_candidate_is_measured_as_what_it_is(name, batch, monkeypatch):
    """On operands that no descriptor names a launch falls back, and the table would praise the wrong kernel."""
    problem = PROBLEMS[name]
    on_the_cpu(monkeypatch)
    monkeypatch.setattr("stf_kernels.ops.descriptors.is_hopper_or_later", lambda device: True)
    bench = ProblemBench(replace(problem, c=128, n=256), torch.bfloat16, batch)
    found = candidates(batch * problem.tokens, problem.n, problem.k, 2, forms=forms_for(problem, "sm_90", 2), **HOPPER)
    for config in found[:24]:
        if config.form != "pointers":
            assert layout_for(bench._blocks, bench._weight, problem.stage, config) is not None, config


def on_the_cpu(monkeypatch):
    """ProblemBench draws on a GPU; here it draws on the CPU and flushes nothing."""
    generator, real = torch.Generator, torch.randn
    # a class, because torch's own annotations name it when a module is first imported
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {"__new__": lambda cls, device: generator()}))
    monkeypatch.setattr(torch, "randn", lambda shape, device, generator: real(shape, generator=generator))
    monkeypatch.setattr(problem_bench, "Flush", lambda device: None)


@pytest.mark.parametrize("name", ["concat_wgrad", "merge_wgrad"])
def test_a_weight_gradient_is_measured_against_the_library(name, monkeypatch):
    """config None must be the library's sum over the same rows, and on operands that it has to copy."""
    on_the_cpu(monkeypatch)
    asked = []
    monkeypatch.setattr(problem_bench.weight_grad, "launch_wgrad", lambda *a: asked.append(a) or a[0])
    bench = ProblemBench(replace(PROBLEMS[name], c=16, n=24), torch.bfloat16, 2)
    found = bench._run(None)
    rows = [segment.flatten(0, -2) for segment in PROBLEMS[name].stage.segments(bench._blocks)]
    torch.testing.assert_close(found, bench._g.t() @ torch.cat(rows, -1), rtol=2e-2, atol=2e-1)
    assert not any(map(problem_bench.weight_grad.has_one_row_stride, bench._blocks))
    assert asked == []
    assert PROBLEMS[name].has_choice(2)
    bench._run(FAST)
    assert asked[0][-1] == FAST


def test_a_tile_that_the_compiler_refuses_is_one_that_does_not_run(monkeypatch, capsys):
    bench = ProblemBench.__new__(ProblemBench)
    bench._problem, bench._blocks, bench._weight, bench._bias, bench._g = CONCAT, [], None, None, None

    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(problem_bench.launch, "run_stage", fail)
    message = "PassManager::run failed"
    assert bench.microseconds(FAST) is None
    assert "does not compile" in capsys.readouterr().out
    message = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory"):
        bench.microseconds(FAST)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_choice_is_measured_where_there_is_one(name, batch, monkeypatch):
    """One image's rows have one stride: no entry of a table for the weight gradient would ever be asked for."""
    on_the_cpu(monkeypatch)
    problem = PROBLEMS[name]
    bench = ProblemBench(replace(problem, c=16, n=24), torch.bfloat16, batch)
    copied = problem.stage.merge_in > 1 or not all(map(problem_bench.weight_grad.has_one_row_stride, bench._blocks))
    assert problem.has_choice(batch) == (not problem.wgrad or copied)
