"""If this fails, the floors that every ratio in the tables stands on are wrong."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench import models, stages
from bench.presets import PRESETS
from bench.problems import LLAVA, STAGES
from bench.roofline import DEVICES, Ceilings, beaten, floors_ms, linear, main, plan_fleet, prefill_work

aten = torch.ops.aten
H200 = DEVICES["nvidia-h200"]


def test_the_projector_is_82_gflop_an_image():
    assert sum(LLAVA.flops(stage, 1) for stage in STAGES) == pytest.approx(82.1e9, rel=1e-3)
    work = prefill_work(PRESETS["7b"], model="llava-stf", batch=1, text_tokens=64, item=2)
    assert sum(piece.flops for piece in work["projector_ms"]) == sum(LLAVA.flops(stage, 1) for stage in STAGES)


@pytest.mark.parametrize(("batch", "microseconds"), [(1, 120), (2, 208), (8, 832), (64, 6654)])
def test_the_projector_floors_of_the_design(batch, microseconds):
    work = prefill_work(PRESETS["7b"], model="llava-stf", batch=batch, text_tokens=64, item=2)
    assert 1e3 * floors_ms(H200, work)["projector_ms"] == pytest.approx(microseconds, rel=0.02)


def test_images_of_a_sequence_are_work_for_the_tower_and_tokens_for_the_language_model():
    one, four = (
        prefill_work(PRESETS["7b"], model="llava-stf", batch=2, text_tokens=64, item=2, images=images)
        for images in (1, 4)
    )
    for stage in ("vision_ms", "projector_ms"):
        assert sum(w.flops for w in four[stage]) == 4 * sum(w.flops for w in one[stage])
    tokens = (4 * 144 + 64) / (144 + 64)
    assert four["prefill_ms"][0].flops == pytest.approx(tokens * one["prefill_ms"][0].flops)
    assert PRESETS["7b"].activation_bytes(2, 64, 2, 4) > 3 * PRESETS["7b"].activation_bytes(2, 64, 2)


def test_a_floor_is_the_slower_of_arithmetic_and_memory():
    ceilings = Ceilings(flops=100.0, bandwidth=10.0, memory=1.0, source="test")
    assert ceilings.seconds(flops=200.0, nbytes=1.0) == 2.0
    assert ceilings.seconds(flops=1.0, nbytes=50.0) == 5.0
    work = linear(2, 3, 5, 2)
    assert (work.flops, work.bytes) == (60.0, 2 * (6 + 15 + 10))


def test_parameters_are_those_of_the_models():
    preset = PRESETS["7b"]
    assert preset.language_parameters == pytest.approx(6.74e9, rel=0.01)
    assert preset.vision_parameters == pytest.approx(0.304e9, rel=0.02)
    assert preset.projector_parameters["stf"] / preset.projector_parameters["mlp2x"] == pytest.approx(8.2, rel=0.01)
    assert preset.kv_bytes(1, 1, 2) == 2 * 32 * 4096 * 2


@pytest.mark.parametrize("heads", [{}, {"kv_heads": 2}, {"head_dim": 32}], ids=str)
@pytest.mark.parametrize("images", [1, 2])
def test_the_products_are_those_that_torch_counts_in_a_run(heads, images):
    """FlopCounterMode over the model itself; attention, whose kernels it does not count on a CPU, by its formula."""
    preset = replace(PRESETS["tiny"], **heads)
    stock = models.build_stock(preset, device="cpu", dtype=torch.float32, seed=0)
    for row in models.build_rows(stock, preset, full=True):
        inputs = models.build_inputs(
            preset, Image.new("RGB", (56, 56)), batch=2, text_tokens=5, image_tokens=row.image_tokens, images=images,
            device="cpu", dtype=torch.float32, seed=0,
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            row.activate()(**inputs.keywords(), logits_to_keep=1)
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.get(op, 0) for op in (aten.mm, aten.bmm, aten.addmm, aten.convolution))
        layers = preset.vision_layers - ("unused-tower-layers" in row.savings("eager", "cpu"))
        work = prefill_work(preset, model=row.model, batch=2, text_tokens=5, item=4, images=images, layers=layers)
        tokens, length = 4**2 + 1, images * row.image_tokens + 5
        attention = 4 * 2 * images * tokens**2 * preset.vision_dim * layers
        attention += 2 * 2 * length**2 * preset.query_dim * preset.layers
        ours = sum(piece.flops for pieces in work.values() for piece in pieces)
        # transformers 5.17 multiplies angles of the rotary embedding as matrices, a few hundred operations
        assert ours == pytest.approx(counted + attention, rel=1e-4), row.name
        cache = stages.cache_bytes(row.module(**inputs.keywords(), logits_to_keep=1).past_key_values)
        assert cache == preset.kv_bytes(length, 2, 4)
        language = [p for name, p in stock.named_parameters() if "language_model" in name or "lm_head" in name]
        assert preset.language_parameters == sum(p.numel() for p in language if p.ndim == 2)


def test_a_fleet_grows_with_load_and_shrinks_with_tokens():
    kwargs = {"batch": 8, "text_tokens": 64, "efficiency": 0.5}
    stock = plan_fleet(PRESETS["7b"], H200, model="llava-1.5", images_per_second=1000, **kwargs)
    fused = plan_fleet(PRESETS["7b"], H200, model="llava-stf", images_per_second=1000, **kwargs)
    twice = plan_fleet(PRESETS["7b"], H200, model="llava-stf", images_per_second=2000, **kwargs)
    assert fused.gpus < stock.gpus
    assert fused.gpus < twice.gpus <= 2 * fused.gpus
    assert fused.kv_bytes_per_image / stock.kv_bytes_per_image == pytest.approx(208 / 640)
    with pytest.raises(ValueError, match="efficiency"):
        plan_fleet(PRESETS["7b"], H200, model="llava-stf", images_per_second=1, batch=1, text_tokens=1, efficiency=2)


def test_the_command_prints_floors_without_torch(capsys):
    assert main(["--batch", "1", "--images-per-second", "100"]) == 0
    assert "llava-stf" in capsys.readouterr().out
    code = "import sys, bench.roofline; bench.roofline.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_busy_moment_lowers_no_ceiling_and_a_beaten_floor_is_said():
    first, second = Ceilings(2.0, 30.0, 5.0, "a"), Ceilings(3.0, 20.0, 4.0, "b")
    assert first.raised(second) == Ceilings(3.0, 30.0, 5.0, "a")
    row = {"floor_ratio": {"total_ms": 1.01}}
    assert beaten([row, {"floor_ratio": {"total_ms": None}}]) is None
    assert "0.54 of its floor" in beaten([row, {"floor_ratio": {"total_ms": 0.54}}])
