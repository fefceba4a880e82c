"""If this fails, the segmented kernel computes something else than the reference: rows, columns, segments or epilogue.

Sizes stand around the tile of the interpreter's configuration, 32 x 32 x 32.
"""

import pytest
import torch
from support.compare import compare_functions
from support.operators import ACTIVATIONS, concat_operands, concat_pair, merge_operands, merge_pair

import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# blocks, batch, tokens, channels, N, bias
CONCAT = {
    "one-tile": (2, 1, 32, 32, 32, True),
    "tails-of-all": (3, 1, 33, 33, 33, True),
    "below-a-tile": (3, 2, 5, 7, 9, False),
    "columns-one-short": (2, 1, 31, 31, 63, True),
    "one-block": (1, 2, 20, 40, 40, True),
    "thirty-two-blocks": (32, 1, 4, 8, 40, True),
    "one-token": (4, 1, 1, 16, 48, True),
    "one-channel": (5, 1, 40, 1, 20, False),
    "many-images": (2, 40, 1, 16, 16, True),
    "rows-of-tiles": (1, 1, 130, 16, 70, True),  # more tile rows than group_m
}


@DTYPES
@pytest.mark.parametrize("shape", CONCAT.values(), ids=CONCAT)
def test_concat_linear(shape, dtype):
    count, batch, tokens, channels, n, bias = shape
    operands = concat_operands(count, batch, tokens, channels, n, bias=bias)
    compare_functions(*concat_pair(count, activation="gelu"), operands, dtype)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    pair = concat_pair(2, crop=1, skip_tokens=1, activation=activation)
    compare_functions(*pair, concat_operands(2, 2, 14, 16, 40), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize(("merge_size", "grid"), [(1, (3, 5)), (2, (4, 6)), (3, (3, 6)), (4, (8, 4)), (2, (2, 34))])
@pytest.mark.parametrize("order", ["patch_major", "channel_major"])
def test_spatial_merge_linear(merge_size, grid, order, dtype):
    pair = merge_pair(1, grid=grid, merge_size=merge_size, skip_tokens=1, activation="gelu", feature_order=order)
    compare_functions(*pair, merge_operands(2, 2 + grid[0] * grid[1], 9, 35, merge_size), dtype)


@DTYPES
@pytest.mark.parametrize("grid", [(5, 4), (4, 5), (7, 5)])
@pytest.mark.parametrize("merge_size", [2, 3])
def test_truncate(grid, merge_size, dtype):
    pair = merge_pair(grid=grid, merge_size=merge_size, truncate=True, activation="silu")
    operands = merge_operands(2, grid[0] * grid[1], 8, 34, merge_size, bias=False)
    compare_functions(*pair, operands, dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_nothing_to_compute(batch, tokens, dtype):
    compare_functions(
        *concat_pair(2, activation="gelu"), concat_operands(2, batch, tokens, 8, 12), dtype, gradients=True
    )


def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def interleaved(x):
    return torch.stack([x, torch.full_like(x, 1e4)], 2).flatten(1, 2)[:, ::2]


def batch_inner(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@DTYPES
def test_blocks_of_unlike_strides(dtype):
    def call(run):
        return lambda weight, bias, a, b, c, d: run(weight, bias, a, transposed(b), interleaved(c), batch_inner(d))

    pair = concat_pair(4, activation="gelu")
    compare_functions(*map(call, pair), concat_operands(4, 2, 9, 33, 24), dtype)


@pytest.mark.parametrize("layout", [transposed, interleaved, batch_inner], ids=lambda f: f.__name__)
def test_merge_of_a_strided_input(layout):
    def call(run):
        return lambda weight, bias, x: run(weight, bias, layout(x))

    pair = merge_pair(grid=(4, 6), skip_tokens=1)
    compare_functions(*map(call, pair), merge_operands(2, 25, 12, 40, 2), torch.float32, gradients=True)


@pytest.mark.parametrize("what", ["bias", "expanded-bias", "weight", "transposed-weight", "expanded-blocks"])
def test_other_strides(what):
    def spread(t):
        return torch.stack([t, torch.full_like(t, 1e4)], t.ndim).flatten(-2)[..., ::2]

    def call(run):
        def changed(weight, bias, *blocks):
            if what == "bias":
                bias = spread(bias)
            elif what == "expanded-bias":
                bias = bias[:1].expand(len(bias))
            elif what == "weight":
                weight = spread(weight)
            elif what == "transposed-weight":
                weight = weight.t().contiguous().t()
            else:
                blocks = [block[:1].expand(3, -1, -1) for block in blocks]
            return run(weight, bias, *blocks)

        return changed

    pair = concat_pair(2, activation="gelu")
    compare_functions(*map(call, pair), concat_operands(2, 2, 9, 16, 40), torch.float32, gradients=True)


def test_torch_ops_directly_with_a_transposed_block():
    """The operator itself is public through torch.ops: it must not read what is not contiguous as if it were."""
    blocks, weight = [transposed(torch.randn(2, 5, 8)) for _ in range(2)], torch.randn(7, 16)
    y = torch.ops.stf_kernels.concat_linear(blocks, [weight], [], None, 0, 1, 0, 0, [])[0]
    torch.testing.assert_close(y, torch.cat(blocks, -1) @ weight.t())


def test_float64_is_refused_by_name():
    with pytest.raises(TypeError, match=r"dtype.*float16.*float64"):
        stf_kernels.concat_linear([torch.zeros(1, 2, 4, dtype=torch.float64)], torch.zeros(3, 4, dtype=torch.float64))
