"""If this fails, the stopwatch, the memory meter, the agreement check or a ratio says what it did not measure."""

import pytest
import torch
from torch import nn

from bench import stats
from bench.meters import FEATURES, Stopwatch, compare, highest_sum, peak_bytes
from bench.prefill.models import POOL, build_stock, randomise
from bench.prefill.modes import STAGES, stage_times, watched
from bench.prefill.presets import preset
from bench.prefill.table import compare_rows, doubt, speedup_field


def test_boundaries_are_met_in_their_order_and_leave_the_model_as_it_was():
    model, met = build_stock(preset("tiny"), device="cpu", dtype=torch.float32), []
    projector, original = model.model.multi_modal_projector, type(model.model.multi_modal_projector).forward
    with watched(model, lambda name, _: met.append(name)):
        assert "forward" not in vars(projector)  # either would change the insertion path
        assert not projector._forward_hooks
        ids = torch.full((1, 16), model.config.image_token_id)
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 56, 56))
    assert met == ["vision", "projector", "insert", "prefill"]
    assert type(projector).forward is original
    assert all("forward" not in vars(module) for module in model.modules())


def test_each_stage_gets_its_own_time_and_the_sum_is_the_total():
    watch = Stopwatch("cpu")
    watch.marks = {"start": 0.0, "vision": 1.0, "projector": 3.0, "insert": 7.0, "prefill": 15.0}
    with pytest.raises(ValueError, match="first_token"):  # a boundary that is never met
        stage_times(watch)
    watch.marks |= {"first_token": 31.0, "end": 63.0}
    assert list(stage_times(watch).values()) == [2e3, 4e3, 1e3 + 8e3, 16e3, 32e3, 63e3]
    assert list(stage_times(watch)) == [*STAGES, "total_ms"]


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
    assert compare("", x, x, FEATURES)["agrees"]
    assert compare("", x.bfloat16(), x.bfloat16() * 1.001, FEATURES)["agrees"]
    assert not any(compare("", other, x, FEATURES)["agrees"] for other in (x * 1.001, x[:1], poisoned, x / 0))


def test_random_weights_are_the_same_every_time_dense_and_never_aligned():
    first, second = nn.Linear(300, 200), nn.Linear(300, 200)
    for module in (first, second):
        randomise(module, 3)
    assert torch.equal(first.weight, second.weight)
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not torch.equal(first.weight[0], first.weight[1])
    assert all(POOL % divisor for divisor in range(2, 4097))  # a prime: no row length divides the pool


def test_spread_ignores_scale_and_a_ratio_of_rounds_survives_drift():
    assert stats.low_high([0.0, 10.0]) == pytest.approx((1.0, 9.0))
    assert stats.low_high([7.0]) == (7.0, 7.0)
    assert stats.spread_percent([100.0, 110.0, 90.0]) == pytest.approx(16.0)
    baseline, ours = [10.0, 20.0, 40.0], [5.0, 10.0, 20.0]  # the machine slows down by 4x, the ratio does not move
    assert stats.paired_ratio(baseline, ours) == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    with pytest.raises(ValueError):
        stats.paired_ratio([1.0, 2.0], [1.0])


def row(model, projector, totals, mode="eager", batch=1, images=1):
    place = {"model": model, "projector": projector, "mode": mode, "batch": batch, "text_tokens": 8, "images": images}
    return place | {"total_ms": totals[0] if totals else None, "samples": {"total_ms": totals}}


def test_rows_are_compared_with_their_own_batch_images_and_mode():
    rows, stf, stock = [], "llava-stf/fused", "llava-1.5/mlp2x"
    for place, theirs, ours in (
        ({}, 10.0, 5.0),
        ({"batch": 8}, 80.0, 20.0),
        ({"mode": "graph"}, 8.0, 2.0),
        ({"images": 4}, 90.0, 30.0),
    ):
        rows += [row("llava-1.5", "mlp2x", [theirs], **place), row("llava-stf", "fused", [ours], **place)]
    assert speedup_field(compare_rows(rows)) == {
        f"{stf} eager over {stock} eager, batch 1, text 8": 2.0,
        f"{stf} eager over {stock} eager, batch 8, text 8": 4.0,
        f"{stock} graph over {stock} eager, batch 1, text 8": 1.25,
        f"{stf} graph over {stock} graph, batch 1, text 8": 4.0,
        f"{stf} graph over {stock} eager, batch 1, text 8": 5.0,
        f"{stf} eager over {stock} eager, batch 1, text 8, 4 images": 3.0,
    }
    assert compare_rows([row("llava-1.5", "mlp2x", [10.0]), row("llava-stf", "fused", [])]) == []  # it failed


def test_noise_is_not_a_speed_up():
    baseline, doubts = row("llava-1.5", "mlp2x", [10.0, 12.0, 10.0, 10.0]), []
    for totals in ([10.0, 10.0, 12.0, 10.0], [5.0, 5.0, 6.0, 5.0], [5.0, 5.0, 6.0]):
        doubts.append(doubt(compare_rows([baseline, row("llava-stf", "fused", totals)])[0]))
    assert "within its rounds' noise" in doubts[0]
    assert doubts[1] is None
    assert "fewer than 4 rounds cannot tell it from noise" in doubts[2]
