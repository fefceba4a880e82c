"""If these fail, the offline search times something else than what an entry of its table will say."""

import functools
from dataclasses import replace

import pytest
import torch

from stf_kernels.configs import GemmConfig
from stf_kernels.ops import first_use, timing, tma, weight_grad
from stf_kernels.ops.weight_grad import has_one_row_stride
from stf_kernels.tune import measure
from stf_kernels.tune.candidates import candidates
from stf_kernels.tune.problems import PROBLEMS

FAST = GemmConfig(128, 128, 64)


@pytest.fixture
def product_of(monkeypatch):
    """The product of a problem by name, at few channels, drawn on the CPU."""
    generator, randn = torch.Generator, torch.randn
    # a class, because torch's own annotations name it when a module is first imported
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {"__new__": lambda cls, device: generator()}))
    monkeypatch.setattr(torch, "randn", lambda shape, device, generator: randn(shape, generator=generator))
    return lambda name, batch, c=16: measure.product_of(replace(PROBLEMS[name], c=c, n=24), torch.bfloat16, batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["concat", "linear_merge", "linear", "linear_scatter"])
def test_every_candidate_can_be_measured(product_of, name, batch, monkeypatch):
    """On operands that no descriptor names a form would be given up, and never get into a table."""
    problem, product, laid_out = PROBLEMS[name], product_of(name, batch, c=128), []
    monkeypatch.setattr(tma, "device_has_tma", lambda device: True)
    found = candidates(problem, batch * problem.tokens, 2, "sm_90", 132)[:24]
    for config in found:
        laid_out.append(product.arguments(config, product.new()))  # or Refused
    assert len(laid_out) == len(found)


@pytest.mark.parametrize("name", ["concat_wgrad", "merge_wgrad"])
def test_a_weight_gradient_is_measured_against_the_library(product_of, name, monkeypatch):
    """The library's sum, and float64's, over the same rows as the kernel gets."""
    asked = []
    monkeypatch.setattr(weight_grad, "wgrad_arguments", lambda config, tensors, stage: asked.append(tensors))
    product = product_of(name, 2)
    product.arguments(FAST, product.new())
    [(blocks, g, dw)] = asked
    rows = [segment.flatten(0, -2) for segment in PROBLEMS[name].stage.segments(blocks)]
    expected = g.t() @ torch.cat(rows, -1)
    assert dw.shape == expected.shape
    torch.testing.assert_close(*product.library(), expected, rtol=2e-2, atol=2e-1)
    [exact] = product.exact(torch.tensor([3, 0]))
    torch.testing.assert_close(exact, expected[[3, 0]].double(), rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_choice_is_measured_where_there_is_one(name, batch):
    """One image's rows have one stride: no entry of a table for the weight gradient would ever be asked for."""
    problem = replace(PROBLEMS[name], c=16, n=24)
    blocks, *_ = problem.operands(torch.zeros, batch)
    copied = problem.stage.merge_in > 1 or not all(map(has_one_row_stride, blocks))
    assert problem.has_choice(batch) == (not problem.wgrad or copied)


def test_what_fails_is_named(product_of, monkeypatch, capsys):
    def measured(product, configs, failed, rounds):
        failed[FAST] = "wrong"
        return {None: 5.0}

    monkeypatch.setattr(first_use, "measure", measured)
    assert measure.measure(replace(PROBLEMS["concat"], c=16, n=24), torch.bfloat16, 1, [FAST]) == {None: 5.0}
    assert f"concat: {FAST} is left out: wrong" in capsys.readouterr().out


def test_times_are_taken_in_turns_on_a_cold_cache(monkeypatch):
    """A simulated clock: each call takes its time, ten times that on a cache that was not flushed before it."""
    now, order, rounds = [0.0], [], {}

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e-3 * (end.at - self.at)

    def flush():
        order.append("flush")
        now[0] += 1000.0

    def call(name, us):
        now[0] += us if order[-1] == "flush" else 10 * us
        order.append(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timing, "Flush", lambda device: flush)
    monkeypatch.setattr(timing.time, "monotonic", lambda: 1e-6 * now[0])
    for us in (1.0, 1e6):
        times = [us * (i + 1) for i in range(3)]
        order.clear()
        found = timing.medians([functools.partial(call, *pair) for pair in enumerate(times)], torch.device("cpu"), 12)
        assert found == pytest.approx(times)
        ran = [name for name in order if name != "flush"]
        assert {ran[3 * turn] for turn in range(1, len(ran) // 3)} == {0, 1, 2}, "each is first at times"
        rounds[us] = len(ran) // 3 - 1
    assert rounds == {1.0: 12, 1e6: 3}
