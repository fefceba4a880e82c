"""If this fails, the floors that every ratio in the tables stands on are wrong."""

import itertools

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.problems import LLAVA, PRODUCTS
from bench.prefill import models, modes
from bench.prefill.floors import cost_on_a_gpu, prefill_work
from bench.prefill.presets import Point, preset
from bench.roofline import Ceilings, linear

aten = torch.ops.aten


def test_the_projector_is_82_gflop_an_image():
    whole = sum(LLAVA.work(product, 1, 2).flops for product in PRODUCTS)
    assert whole == pytest.approx(82.1e9, rel=1e-3)
    work = prefill_work(preset("7b"), "llava-stf", Point(1, 64), 2)
    assert sum(piece.flops for piece in work["projector_ms"]) == whole
    known = Ceilings(790e12, 4.3e12, "measured on such a card")
    assert 1e6 * sum(map(known.seconds, work["projector_ms"])) == pytest.approx(120, rel=0.02)


@pytest.mark.parametrize(("family", "tokens"), [("llava-next", (2340, 594)), ("llava-onevision", (2929, 347))])
def test_the_photograph_has_the_tokens_of_the_real_models(family, tokens):
    """4 tiles and the base: 24*24 + 36*49 of LLaVA-NeXT, 12*12 + 18*25 of a quarter; and what that brings an H100."""
    whole = preset("7b", family, (480, 640))
    assert (whole.tiles, whole.image_tokens(1), whole.image_tokens(whole.merge_size)) == (5, *tokens)
    assert all(str(count) in cost_on_a_gpu(whole) for count in tokens)


def test_a_product_moves_each_operand_once_and_the_slower_of_two_ceilings_counts():
    work = linear(2, 3, 5, 2)
    assert (work.flops, work.bytes) == (60.0, 2 * (6 + 15 + 10))
    assert Ceilings(60.0, 31.0, "").seconds(work) == 2.0


@pytest.mark.parametrize(
    ("family", "options", "images"),
    [
        *itertools.product(["llava-1.5"], [{}, {"num_key_value_heads": 2}, {"head_dim": 32}], [1, 2]),
        ("llava-next", {}, 1),
        ("llava-onevision", {}, 1),
    ],
)
def test_the_products_are_those_that_torch_counts_in_a_run(family, options, images):
    """FlopCounterMode over the model itself; attention, whose kernels it does not count on a CPU, by its formula."""
    sizes, factory = preset("tiny", family, (60, 100), **options), {"device": "cpu", "dtype": torch.float32}
    pixels, point = models.image_processor(sizes)(Image.new("RGB", (100, 60)), 2 * images), Point(2, 5, images)
    for row in models.build_rows(models.build_stock(sizes, **factory), sizes, full=not sizes.size):
        inputs = models.build_inputs(sizes, pixels, point, row.image_tokens, **factory)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = row.module(**inputs, logits_to_keep=1)
        counts = counter.get_flop_counts()["Global"]
        counted = sum(counts.get(op, 0) for op in (aten.mm, aten.bmm, aten.addmm, aten.convolution))
        vision = sizes.config.vision_config
        layers = vision.num_hidden_layers - (row.model == models.SKIP)
        if sizes.size and row.model.endswith("-stf"):  # as its users call it
            layers = max(row.module.config.vision_feature_layer)
        tokens, length = sizes.grid**2 + (family != "llava-onevision"), images * row.image_tokens + 5
        attention = 4 * 2 * images * sizes.tiles * tokens**2 * vision.hidden_size * layers
        attention += 2 * 2 * length**2 * sizes.attention_widths[0] * 2
        ours = sum(piece.flops for pieces in prefill_work(sizes, row.model, point, 4).values() for piece in pieces)
        # transformers 5.17 multiplies angles of the rotary embedding as matrices, a few hundred operations
        assert ours == pytest.approx(counted + attention, rel=1e-3 if sizes.size else 1e-4), row.name
        assert modes.cache_bytes(output.past_key_values) == 2 * 2 * 2 * length * sizes.attention_widths[1] * 4
