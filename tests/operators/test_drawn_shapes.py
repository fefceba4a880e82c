"""If this fails, some shape nobody thought of is computed wrongly; the message holds the smallest one found."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compare import compare_functions, compare_modules, twins
from support.operators import ACTIVATIONS, concat_operands, concat_pair, merge_operands, merge_pair

import reference
import stf_kernels

DRAWN = settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WIDE = st.sampled_from([torch.float32, torch.float64])  # in 16 bit torch may be exact by luck on a tiny shape
ACTIVATION = st.sampled_from(ACTIVATIONS)


@DRAWN
@given(
    count=st.integers(1, 12), batch=st.integers(0, 3), tokens=st.integers(0, 9), channels=st.integers(1, 20),
    n=st.integers(1, 40), skip=st.integers(0, 3), crop=st.integers(0, 2), bias=st.booleans(), activation=ACTIVATION,
    dtype=WIDE,
)  # fmt: skip
def test_concat_linear(count, batch, tokens, channels, n, skip, crop, bias, activation, dtype):
    operands = concat_operands(count, batch, crop + skip + tokens, channels, n, bias=bias)
    pair = concat_pair(count, crop, skip_tokens=skip, activation=activation)
    compare_functions(*pair, operands, dtype, gradients=True)


@DRAWN
@given(
    merge_size=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9), batch=st.integers(0, 3),
    channels=st.integers(1, 20), n=st.integers(1, 40), skip=st.integers(0, 2), crop=st.integers(0, 2),
    bias=st.booleans(), activation=ACTIVATION, order=st.sampled_from(["patch_major", "channel_major"]), dtype=WIDE,
)  # fmt: skip
def test_spatial_merge_linear(
    merge_size, height, width, batch, channels, n, skip, crop, bias, activation, order, dtype
):
    operands = merge_operands(batch, crop + skip + height * width, channels, n, merge_size, bias=bias)
    pair = merge_pair(
        crop, grid=(height, width), merge_size=merge_size, skip_tokens=skip, activation=activation,
        feature_order=order, truncate=True,
    )  # fmt: skip
    compare_functions(*pair, operands, dtype, gradients=True)


@DRAWN
@given(
    count=st.integers(1, 6), dim=st.integers(1, 12), out_dim=st.integers(1, 20), merge_size=st.integers(1, 4),
    height=st.integers(1, 8), width=st.integers(1, 8), batch=st.integers(0, 3), skip=st.integers(0, 2),
    bias=st.booleans(), activation=ACTIVATION, dtype=WIDE,
)  # fmt: skip
def test_projector(count, dim, out_dim, merge_size, height, width, batch, skip, bias, activation, dtype):
    modules = twins(
        stf_kernels.CompactTokenProjector, reference.CompactTokenProjector, count, dim, out_dim,
        merge_size=merge_size, skip_tokens=skip, bias=bias, activation=activation,
        mbtf_hidden_dim=2 * dim, stf_hidden_dim=24, truncate=True, dtype=dtype,
    )  # fmt: skip
    blocks = [torch.randn(batch, skip + height * width, dim) for _ in range(count)]
    compare_modules(modules, blocks, dtype, lambda module, x: module(x, (height, width)), gradients=True)
