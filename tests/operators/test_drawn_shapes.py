"""If this fails, some shape nobody thought of is computed wrongly; the message holds the smallest one found."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compare import compare_functions, compare_modules, twins
from support.operators import ACTIVATIONS, concat_operands, concat_pair, merge_operands, merge_pair

DRAWN = settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BATCHES, CROPS = st.integers(0, 3), st.integers(0, 2)
CHANNELS, WIDTHS, SIDES = st.integers(1, 20), st.integers(1, 40), st.integers(1, 9)
OPTIONS = st.fixed_dictionaries({"skip_tokens": st.integers(0, 3), "activation": st.sampled_from(ACTIVATIONS)})
WIDE = st.sampled_from([torch.float32, torch.float64])  # in 16 bit torch may be exact by luck on a tiny shape


@DRAWN
@given(st.integers(1, 12), BATCHES, st.integers(0, 9), CHANNELS, WIDTHS, CROPS, st.booleans(), OPTIONS, WIDE)
def test_concat_linear(count, batch, tokens, channels, n, crop, bias, options, dtype):
    operands = concat_operands(count, batch, crop + options["skip_tokens"] + tokens, channels, n, bias=bias)
    compare_functions(*concat_pair(count, crop, **options), operands, dtype, gradients=True)


ORDERS = st.sampled_from(["patch_major", "channel_major"])


@DRAWN
@given(st.integers(1, 4), SIDES, SIDES, BATCHES, CHANNELS, WIDTHS, CROPS, st.booleans(), OPTIONS, ORDERS, WIDE)
def test_spatial_merge_linear(merge_size, height, width, batch, channels, n, crop, bias, options, order, dtype):
    tokens = crop + options["skip_tokens"] + height * width
    operands = merge_operands(batch, tokens, channels, n, merge_size, bias=bias)
    grid = {"grid": (height, width), "merge_size": merge_size, "feature_order": order, "truncate": True}
    compare_functions(*merge_pair(crop, **grid, **options), operands, dtype, gradients=True)


@DRAWN
@given(st.integers(1, 6), CHANNELS, CHANNELS, st.integers(1, 4), SIDES, SIDES, BATCHES, st.booleans(), OPTIONS, WIDE)
def test_projector(count, dim, out_dim, merge_size, height, width, batch, bias, options, dtype):
    widths = {"mbtf_hidden_dim": 2 * dim, "stf_hidden_dim": 24}
    options = {"merge_size": merge_size, "bias": bias, "truncate": True, **widths, **options}
    modules = twins("CompactTokenProjector", count, dim, out_dim, **options, dtype=dtype)
    blocks = [torch.randn(batch, options["skip_tokens"] + height * width, dim) for _ in range(count)]
    compare_modules(modules, blocks, dtype, lambda module, x: module(x, (height, width)), gradients=True)
