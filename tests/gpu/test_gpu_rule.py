"""If this fails, a compiled kernel is wrong on this GPU: at LLaVA's sizes, at odd ones, or in a gradient."""

import pytest
import torch
from support.compare import compare_functions, compare_modules, twins
from support.operators import ACTIVATIONS, CHANGES, changed, concat_operands, concat_pair, merge_operands, merge_pair

import stf_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
CUDA = "cuda"


@DTYPES
@BACKENDS
def test_projector_of_llava(dtype, backend):
    batch = 2 if dtype != torch.float32 else 1
    modules = twins("CompactTokenProjector", 8, 1024, 4096, skip_tokens=1, dtype=dtype, device=CUDA)
    blocks = [torch.randn(batch, 577, 1024, device=CUDA) for _ in range(8)]
    with stf_kernels.use_backend(backend):
        y = compare_modules(modules, blocks, dtype, gradients=True)
    assert y.shape == (batch, 144, 4096)


@DTYPES
@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_projector_forward_at_every_bucket_of_rows(batch, dtype):
    """A quarter of the widths, so that the rows decide the configuration."""
    modules = twins("CompactTokenProjector", 8, 256, 1024, skip_tokens=1, dtype=dtype, device=CUDA)
    blocks = [torch.randn(batch, 577, 256, device=CUDA) for _ in range(8)]
    with torch.no_grad(), stf_kernels.use_backend("triton"):
        compare_modules(modules, blocks, dtype)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 8, 40), (3, 2, 65, 72, 136), (5, 3, 33, 50, 77), (32, 1, 20, 16, 40), (7, 2, 129, 1, 33)],
    ids=str,
)
def test_concat_linear_at_odd_sizes(shape, dtype):
    with stf_kernels.use_backend("triton"):
        pair = concat_pair(shape[0], activation="gelu")
        compare_functions(*pair, concat_operands(*shape, device=CUDA), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    with stf_kernels.use_backend("triton"):
        pair = concat_pair(3, crop=1, skip_tokens=1, activation=activation)
        compare_functions(*pair, concat_operands(3, 2, 40, 64, 96, bias=False, device=CUDA), dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize(("merge_size", "grid"), [(1, (5, 7)), (2, (24, 24)), (2, (27, 27)), (3, (9, 6)), (4, (8, 17))])
def test_spatial_merge_linear(merge_size, grid, dtype):
    with stf_kernels.use_backend("triton"):
        pair = merge_pair(1, grid=grid, merge_size=merge_size, truncate=True, activation="gelu")
        operands = merge_operands(3, 1 + grid[0] * grid[1], 72, 200, merge_size, device=CUDA)
        compare_functions(*pair, operands, dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("what", ["unaligned-and-another", "each-block-another"])
def test_strides(what, dtype):
    with stf_kernels.use_backend("triton"):
        pair = changed(concat_pair(3, activation="gelu"), CHANGES[what])
        compare_functions(*pair, concat_operands(3, 3, 17, 64, 96, device=CUDA), dtype, gradients=True)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    modules = twins("CompactTokenProjector", 3, 32, 64, dtype=torch.bfloat16, device=CUDA)
    with stf_kernels.use_backend("triton"):
        blocks = [torch.randn(batch, 16, 32, device=CUDA) for _ in range(3)]
        compare_modules(modules, blocks, torch.bfloat16, gradients=True)


def test_tf32_is_used_only_where_torch_allows_it():
    operands = concat_operands(4, 2, 100, 256, 256, device=CUDA)
    ours, theirs = concat_pair(4)
    exact = theirs(*(t.double() for t in operands))
    errors = []
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        with stf_kernels.use_backend("triton"):
            errors.append((ours(*operands) - exact).abs().max().item())
    assert errors[0] < 1e-5 < errors[1] < 1e-2
