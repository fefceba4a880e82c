"""If this fails, medians, spreads, speed-ups or the refusal of one are wrong: every table in the README is suspect."""

import pytest

from bench.speedup import compare_rows, doubt, refusal, speedup_field
from bench.stats import median, paired_ratio, percentile, spread_percent
from bench.table import number, render


def test_median_and_percentiles_interpolate():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert percentile([7.0], 0.1) == 7.0


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="samples"):
        median([])


def test_spread_ignores_scale_and_order():
    assert spread_percent([100.0, 110.0, 90.0]) == pytest.approx(16.0)
    assert spread_percent([1.0, 1.1, 0.9]) == pytest.approx(16.0)
    assert spread_percent([5.0]) == 0.0


def test_a_ratio_pairs_rounds_and_so_survives_drift():
    baseline, ours = [10.0, 20.0, 40.0], [5.0, 10.0, 20.0]  # the machine slows down by 4x, the ratio does not move
    assert paired_ratio(baseline, ours) == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    with pytest.raises(ValueError):
        paired_ratio([1.0, 2.0], [1.0])


def row(model, projector, totals, mode="eager", batch=1):
    return {
        "model": model, "projector": projector, "mode": mode, "batch": batch, "text_tokens": 8,
        "total_ms": median(totals) if totals else None, "samples": {"total_ms": totals},
    }  # fmt: skip


def test_rows_are_compared_with_their_own_batch_and_mode():
    rows = [
        row("llava-1.5", "mlp2x", [10.0, 10.0, 10.0]),
        row("llava-stf", "fused", [5.0, 5.0, 5.0]),
        row("llava-1.5", "mlp2x", [80.0, 80.0, 80.0], batch=8),
        row("llava-stf", "fused", [20.0, 20.0, 20.0], batch=8),
        row("llava-1.5", "mlp2x", [8.0, 8.0, 8.0], mode="graph"),
        row("llava-stf", "fused", [2.0, 2.0, 2.0], mode="graph"),
    ]
    assert speedup_field(compare_rows(rows)) == {
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 1, text 8": 2.0,
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 8, text 8": 4.0,
        "llava-1.5/mlp2x graph over llava-1.5/mlp2x eager, batch 1, text 8": 1.25,
        "llava-stf/fused graph over llava-1.5/mlp2x graph, batch 1, text 8": 4.0,
        "llava-stf/fused graph over llava-1.5/mlp2x eager, batch 1, text 8": 5.0,
    }


def test_rows_are_compared_with_their_own_number_of_images():
    rows = [
        row("llava-1.5", "mlp2x", [10.0]),
        row("llava-stf", "fused", [5.0]),
        {**row("llava-1.5", "mlp2x", [90.0]), "images": 4},
        {**row("llava-stf", "fused", [30.0]), "images": 4},
    ]
    assert speedup_field(compare_rows(rows)) == {
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 1, text 8": 2.0,
        "llava-stf/fused eager over llava-1.5/mlp2x eager, batch 1, text 8, 4 images": 3.0,
    }


def test_noise_is_not_a_speed_up():
    baseline = row("llava-1.5", "mlp2x", [10.0, 12.0, 10.0, 10.0])
    noisy, clear, few = (
        compare_rows([baseline, row("llava-stf", "fused", totals)])[0]
        for totals in ([10.0, 10.0, 12.0, 10.0], [5.0, 5.0, 6.0, 5.0], [5.0, 5.0, 6.0])
    )
    assert [found["beyond_noise"] for found in (noisy, clear, few)] == [False, True, None]
    assert [doubt(found) for found in (noisy, clear, few)] == [
        "within its rounds' noise", None, "fewer than 4 rounds cannot tell it from noise",
    ]  # fmt: skip


def test_a_row_that_failed_has_no_speed_up():
    assert compare_rows([row("llava-1.5", "mlp2x", [10.0]), row("llava-stf", "fused", [])]) == []


def test_refusal_names_what_differs():
    good, bad = {"name": "features", "agrees": True}, {"name": "logits, fused", "agrees": False}
    assert refusal([good]) is None
    assert "logits, fused" in refusal([good, bad])
    assert "features" not in refusal([good, bad])


def test_table_aligns_and_refuses_a_short_row():
    lines = render(("model", "ms"), [("a", number(1234.56)), ("longer", number(None))], left=1).splitlines()
    assert lines[2].endswith("1,234.6")
    assert lines[3].endswith("-")
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(ValueError, match="cells"):
        render(("model", "ms"), [("a",)])
