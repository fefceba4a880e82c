"""If this fails, training on the torch path follows a wrong gradient: of a block, a weight or a bias, in some dtype."""

import pytest
import torch
from support.compare import compare_functions, compare_modules, twins
from support.operators import ACTIVATIONS, concat_operands, concat_pair, merge_operands, merge_pair

import reference
import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_concat_linear(activation, bias, dtype):
    pair = concat_pair(3, crop=1, skip_tokens=1, activation=activation)
    compare_functions(*pair, concat_operands(3, 2, 14, 16, 24, bias=bias), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("count", [1, 32])
def test_few_and_many_blocks(count, dtype):
    operands = concat_operands(count, 2, 9, 8, 40)
    compare_functions(*concat_pair(count, activation="gelu"), operands, dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_spatial_merge_linear(activation, bias, dtype):
    pair = merge_pair(1, grid=(4, 6), skip_tokens=1, activation=activation)
    compare_functions(*pair, merge_operands(2, 26, 12, 40, 2, bias=bias), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize(("merge_size", "grid"), [(1, (3, 5)), (2, (5, 7)), (3, (6, 7)), (4, (9, 8))])
@pytest.mark.parametrize("order", ["patch_major", "channel_major"])
def test_merge_sizes_truncated(merge_size, grid, order, dtype):
    """Tokens of no window get a gradient of zero."""
    pair = merge_pair(grid=grid, merge_size=merge_size, truncate=True, feature_order=order, activation="gelu")
    operands = merge_operands(2, grid[0] * grid[1], 10, 36, merge_size)
    compare_functions(*pair, operands, dtype, gradients=True)


PROJECTORS = {
    "defaults": {},
    "class-token": {"skip_tokens": 1},
    "truncated": {"truncate": True},
    "no-bias": {"bias": False},
    "silu": {"activation": "silu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "linear": {"activation": None},
    "r1": {"merge_size": 1},
    "r3": {"merge_size": 3, "truncate": True},
}


@DTYPES
@pytest.mark.parametrize("options", PROJECTORS.values(), ids=PROJECTORS)
def test_projector(options, dtype):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    grid = (5, 7) if options.get("truncate") else (4, 6)
    modules = twins(*classes, 3, 8, 20, **options, dtype=dtype)
    blocks = [torch.randn(2, grid[0] * grid[1] + options.get("skip_tokens", 0), 8) for _ in range(3)]
    compare_modules(modules, blocks, dtype, lambda module, x: module(x, grid), gradients=True)


@DTYPES
def test_stf_alone(dtype):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    modules = twins(*classes, 1, 8, 20, mbtf=False, skip_tokens=1, dtype=dtype)
    compare_modules(modules, [torch.randn(2, 17, 8)], dtype, gradients=True)


@DTYPES
def test_the_children_alone(dtype):
    fusion = twins(stf_kernels.MultiBlockTokenFusion, reference.MultiBlockTokenFusion, 3, 8, skip_tokens=1, dtype=dtype)
    compare_modules(fusion, [torch.randn(2, 25, 8) for _ in range(3)], dtype, gradients=True)
    merging = twins(stf_kernels.SpatialTokenFusion, reference.SpatialTokenFusion, 8, 20, dtype=dtype)
    x = [torch.randn(2, 24, 8)]
    compare_modules(merging, x, dtype, lambda module, blocks: module(blocks[0], (4, 6)), gradients=True)


@pytest.mark.parametrize("name", ["MultiBlockTokenFusion", "SpatialTokenFusion", "CompactTokenProjector"])
def test_an_empty_batch_has_gradients_of_zero(name):
    """A rank of a data-parallel run without an image still has to take part in the reduction."""
    args = (8, 20) if name == "SpatialTokenFusion" else (3, 8) if name == "MultiBlockTokenFusion" else (3, 8, 20)
    modules = twins(getattr(stf_kernels, name), getattr(reference, name), *args, dtype=torch.float32)
    blocks = [torch.randn(0, 16, 8) for _ in range(1 if name == "SpatialTokenFusion" else 3)]

    def call(module, x):
        return module(x[0] if name == "SpatialTokenFusion" else x)

    compare_modules(modules, blocks, torch.float32, call, gradients=True)


def test_a_gradient_of_stride_zero():
    """What `y.sum().backward()` sends back."""
    weight, bias, *blocks = (t.requires_grad_() for t in concat_operands(2, 2, 5, 8, 12))
    stf_kernels.concat_linear(blocks, weight, bias, activation="gelu").sum().backward()
    found = [t.grad.clone() for t in (weight, bias, *blocks)]
    for t in (weight, bias, *blocks):
        t.grad = None
    reference.concat_linear(blocks, weight, bias, activation="gelu").sum().backward()
    for mine, t in zip(found, (weight, bias, *blocks), strict=True):
        torch.testing.assert_close(mine, t.grad)


def test_gradients_accumulate():
    module = stf_kernels.CompactTokenProjector(2, 4, 6)
    blocks = [torch.randn(1, 16, 4) for _ in range(2)]
    module(blocks).sum().backward()
    once = {name: p.grad.clone() for name, p in module.named_parameters()}
    module(blocks).sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])


def test_retain_graph_gives_the_same_bits_twice():
    module = stf_kernels.CompactTokenProjector(2, 4, 6)
    y = module([torch.randn(1, 16, 4) for _ in range(2)]).sum()
    first = torch.autograd.grad(y, list(module.parameters()), retain_graph=True)
    second = torch.autograd.grad(y, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
