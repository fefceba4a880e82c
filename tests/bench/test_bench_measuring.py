"""If this fails, the stopwatch, the memory meter or the agreement check measures something else than it says."""

import time

import pytest
import torch
from torch import nn

from bench import agreement
from bench.memory import highest_sum, peak_bytes, weight_bytes
from bench.models import POOL, pool_tokens, randomise
from bench.stages import STAGES, Stopwatch, cache_bytes, vision_entry, watched


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Sleeper(0.02)

    def forward(self, x):
        return self.embeddings(x)


class Fake(nn.Module):
    """A model with LLaVA's skeleton, whose stages take known times."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = Tower()
        self.model.multi_modal_projector = Sleeper(0.04)
        self.model.language_model = Sleeper(0.08)

    def forward(self, x):
        time.sleep(0.01)
        x = self.model.multi_modal_projector(self.model.vision_tower(x))
        time.sleep(0.01)
        return self.model.language_model(x)


def test_each_stage_gets_its_own_time_and_the_sum_is_the_total():
    model, watch = Fake(), Stopwatch("cpu")
    watch.mark("start")
    with watched(model, watch.mark):
        model(1)
    watch.mark("first_token")
    watch.mark("end")
    times = watch.stages()
    asleep = {"vision_ms": 20, "projector_ms": 40, "insert_ms": 20, "prefill_ms": 80}
    assert all(times[stage] >= least for stage, least in asleep.items())
    assert (
        times["projector_ms"] < 40 + times["total_ms"] - 160
    )  # what a busy machine adds is not more than it adds in all
    assert sum(times[stage] for stage in STAGES) == pytest.approx(times["total_ms"])


def test_watching_leaves_the_model_as_it_was():
    model = Fake()
    original, projector = Sleeper.forward, model.model.multi_modal_projector
    with watched(model, lambda name: None):
        assert Sleeper.forward is not original
        assert "forward" not in vars(projector)  # either would change the insertion path
        assert not projector._forward_hooks
    assert Sleeper.forward is original
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_boundary_that_is_never_met_is_an_error():
    watch = Stopwatch("cpu")
    watch.mark("start")
    watch.mark("end")
    with pytest.raises(ValueError, match="projector"):
        watch.stages()
    with pytest.raises(ValueError, match="vision_tower"):
        vision_entry(nn.Linear(1, 1))


def test_peak_counts_scratch_that_is_gone_and_not_what_was_there():
    x = torch.ones(1 << 20)  # 4 MiB, allocated before

    def call():
        a = x + 1  # 4 MiB
        b = torch.cat([a, a])  # 12 MiB in all
        del a
        return b.sum()

    _, peak = peak_bytes(call, "cpu")
    assert 12 << 20 <= peak < 13 << 20
    assert highest_sum([(2.0, -5), (1.0, 5), (3.0, 4)]) == 5


def test_shared_weights_are_counted_once():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    assert weight_bytes(nn.ModuleList([a, b])) == 2 * 8 * 8 * 4
    b.weight = a.weight
    assert weight_bytes(nn.ModuleList([a, b])) == 8 * 8 * 4


def test_agreement_bounds_rounding_and_nothing_more():
    x = torch.randn(64, 64)
    assert agreement.compare("same", x, x, agreement.FEATURES).agrees
    assert not agreement.compare("off", x * 1.001, x, agreement.FEATURES).agrees
    assert agreement.compare("rounded", x.bfloat16(), x.bfloat16() * 1.001, agreement.FEATURES).agrees
    assert not agreement.compare("shape", x[:1], x, agreement.FEATURES).agrees
    poisoned = x.clone()
    poisoned[0, 0] = float("nan")
    assert not agreement.compare("nan", poisoned, x, agreement.FEATURES).agrees
    assert not agreement.compare("inf", x / 0, x, agreement.FEATURES).agrees


def test_random_weights_are_the_same_every_time_dense_and_never_aligned():
    first, second = (nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200)) for _ in range(2))
    for module in (first, second):
        randomise(module, 3)
    assert torch.equal(first[0].weight, second[0].weight)
    assert (first[0].weight != 0).float().mean() > 0.99
    assert first[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(first[0].weight[0], first[0].weight[1])
    assert (first[1].weight == 1).all()
    assert all(POOL % divisor for divisor in range(2, 4097))  # a prime: no row length divides the pool


def test_pooling_averages_windows_of_the_grid():
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert pool_tokens(tokens, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_cache_bytes_are_those_of_keys_and_values():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache_bytes(cache) == 2 * 24 * 4
