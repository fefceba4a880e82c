"""If this fails, the stopwatch, the memory meter, the agreement check or a ratio says what it did not measure."""

import time

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from bench import agreement, stats
from bench.meters import Stopwatch, highest_sum, peak_bytes
from bench.prefill.models import POOL, pool_tokens, randomise
from bench.prefill.speedup import compare_rows, doubt, refusal, speedup_field
from bench.prefill.stages import STAGES, cache_bytes, stage_times, watched


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


class Fake(nn.Module):
    """A model with LLaVA's skeleton, whose stages take known times."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.embeddings = Sleeper(0.02)
        self.model.multi_modal_projector = Sleeper(0.04)
        self.model.language_model = Sleeper(0.08)

    def forward(self, x):
        time.sleep(0.01)
        x = self.model.multi_modal_projector(self.model.vision_tower.embeddings(x))
        time.sleep(0.01)
        return self.model.language_model(x)


def test_each_stage_gets_its_own_time_and_the_sum_is_the_total():
    model, watch = Fake(), Stopwatch("cpu")
    watch.mark("start")
    with watched(model, watch.mark):
        model(1)
    with pytest.raises(ValueError, match="first_token"):  # a boundary that is never met
        stage_times(watch)
    watch.mark("first_token")
    watch.mark("end")
    times = stage_times(watch)
    asleep = {"vision_ms": 20, "projector_ms": 40, "insert_ms": 20, "prefill_ms": 80}
    assert all(times[stage] >= least for stage, least in asleep.items())
    # What a busy machine adds is not more than it adds in all.
    assert times["projector_ms"] < 40 + times["total_ms"] - 160
    assert sum(times[stage] for stage in STAGES) == pytest.approx(times["total_ms"])


def test_watching_leaves_the_model_as_it_was():
    model, original = Fake(), Sleeper.forward
    projector = model.model.multi_modal_projector
    with watched(model, lambda name: None):
        assert Sleeper.forward is not original
        assert "forward" not in vars(projector)  # either would change the insertion path
        assert not projector._forward_hooks
    assert Sleeper.forward is original
    assert all("forward" not in vars(module) for module in model.modules())


def test_peak_counts_scratch_that_is_gone_and_not_what_was_there():
    x = torch.ones(1 << 20)  # 4 MiB, allocated before

    def call():
        a = x + 1  # 4 MiB
        b = torch.cat([a, a])  # 12 MiB in all
        del a
        return b.sum()

    assert 12 << 20 <= peak_bytes(call, "cpu")[1] < 13 << 20
    assert highest_sum([(2.0, -5), (1.0, 5), (3.0, 4)]) == 5


def test_agreement_bounds_rounding_and_nothing_more():
    x = torch.randn(64, 64)
    poisoned = x.clone()
    poisoned[0, 0] = float("nan")

    def agrees(ours, theirs=x):
        return agreement.compare("", ours, theirs, agreement.FEATURES)["agrees"]

    assert agrees(x)
    assert agrees(x.bfloat16(), x.bfloat16() * 1.001)
    assert not any(map(agrees, (x * 1.001, x[:1], poisoned, x / 0)))


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


def test_pooling_averages_windows_and_a_cache_counts_keys_and_values():
    assert pool_tokens(torch.arange(16.0).view(1, 16, 1), 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache_bytes(cache) == 2 * 24 * 4


def test_spread_ignores_scale_and_order_and_interpolates():
    assert stats.low_high([0.0, 10.0]) == pytest.approx((1.0, 9.0))
    assert stats.low_high([7.0]) == (7.0, 7.0)
    assert stats.spread_percent([100.0, 110.0, 90.0]) == pytest.approx(16.0)
    assert stats.spread_percent([1.0, 1.1, 0.9]) == pytest.approx(16.0)


def test_a_ratio_pairs_rounds_and_so_survives_drift():
    baseline, ours = [10.0, 20.0, 40.0], [5.0, 10.0, 20.0]  # the machine slows down by 4x, the ratio does not move
    assert stats.paired_ratio(baseline, ours) == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    with pytest.raises(ValueError):
        stats.paired_ratio([1.0, 2.0], [1.0])


def row(model, projector, totals, mode="eager", batch=1, images=1):
    place = {"model": model, "projector": projector, "mode": mode, "batch": batch, "text_tokens": 8, "images": images}
    return place | {"total_ms": totals[0] if totals else None, "samples": {"total_ms": totals}}


def test_rows_are_compared_with_their_own_batch_images_and_mode():
    rows = []
    for stock, fused, place in (
        (10.0, 5.0, {}), (80.0, 20.0, {"batch": 8}), (8.0, 2.0, {"mode": "graph"}), (90.0, 30.0, {"images": 4}),
    ):  # fmt: skip
        rows += [row("llava-1.5", "mlp2x", [stock], **place), row("llava-stf", "fused", [fused], **place)]
    assert speedup_field(compare_rows(rows)) == {
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 1, text 8": 2.0,
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 8, text 8": 4.0,
        "llava-1.5/mlp2x graph over llava-1.5/mlp2x eager, batch 1, text 8": 1.25,
        "llava-stf/fused graph over llava-1.5/mlp2x graph, batch 1, text 8": 4.0,
        "llava-stf/fused graph over llava-1.5/mlp2x eager, batch 1, text 8": 5.0,
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 1, text 8, 4 images": 3.0,
    }
    assert compare_rows([row("llava-1.5", "mlp2x", [10.0]), row("llava-stf", "fused", [])]) == []  # it failed


def test_noise_is_not_a_speed_up():
    baseline = row("llava-1.5", "mlp2x", [10.0, 12.0, 10.0, 10.0])
    noisy, clear, few = (
        compare_rows([baseline, row("llava-stf", "fused", totals)])[0]
        for totals in ([10.0, 10.0, 12.0, 10.0], [5.0, 5.0, 6.0, 5.0], [5.0, 5.0, 6.0])
    )
    assert [found["beyond_noise"] for found in (noisy, clear, few)] == [False, True, None]
    assert doubt(clear) is None
    assert "within its rounds' noise" in doubt(noisy)
    assert "fewer than 4 rounds cannot tell it from noise" in doubt(few)


def test_refusal_names_what_differs():
    good, bad = {"name": "features", "agrees": True}, {"name": "logits, fused", "agrees": False}
    assert refusal([good]) is None
    assert "logits, fused" in refusal([good, bad])
    assert "features" not in refusal([good, bad])
