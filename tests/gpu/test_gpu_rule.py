"""If this fails, a compiled kernel is wrong on this GPU: at LLaVA's sizes, at odd ones, or in a gradient."""

import pytest
import torch
from support.compare import compare_modules, twins
from support.operators import ACTIVATIONS, CHANGES, concat, merge

import stf_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def compare_projector(sizes, batch, tokens, dtype, backend="triton", *, gradients=True):
    modules = twins("CompactTokenProjector", *sizes, skip_tokens=1, dtype=dtype, device="cuda")
    blocks = [torch.randn(batch, tokens, sizes[1], device="cuda") for _ in range(sizes[0])]
    with stf_kernels.use_backend(backend):
        compare_modules(modules, blocks, dtype, gradients=gradients)


@DTYPES
@pytest.mark.parametrize("backend", ["triton", "auto", "torch"])
def test_projector_of_llava(dtype, backend):
    compare_projector((8, 1024, 4096), 2 if dtype != torch.float32 else 1, 577, dtype, backend)


@DTYPES
@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_projector_forward_at_every_bucket_of_rows(batch, dtype):
    """A quarter of the widths, so that the rows decide the configuration."""
    with torch.no_grad():
        compare_projector((8, 256, 1024), batch, 577, dtype, gradients=False)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    compare_projector((3, 32, 64), batch, 17, torch.bfloat16)


SHAPES = [(1, 1, 1, 8, 40), (3, 2, 65, 72, 136), (5, 3, 33, 50, 77), (32, 1, 20, 16, 40), (7, 2, 129, 1, 33)]
GRIDS = [(1, (5, 7)), (2, (24, 24)), (2, (27, 27)), (3, (9, 6)), (4, (8, 17))]
CASES = {str(shape): concat(*shape, activation="gelu") for shape in SHAPES}
CASES |= {f"{act}": concat(3, 2, 40, 64, 96, False, crop=1, skip_tokens=1, activation=act) for act in ACTIVATIONS}
CASES |= {f"merge {r} {grid}": merge(3, grid, 72, 200, r, crop=1, activation="gelu") for r, grid in GRIDS}
CASES |= {
    name: concat(3, 3, 17, 64, 96, activation="gelu", change=CHANGES[name])
    for name in ("unaligned-and-another", "each-block-another")
}


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_functions(case, dtype):
    with stf_kernels.use_backend("triton"):
        case.compare(dtype, "cuda")


def test_tf32_is_used_only_where_torch_allows_it():
    blocks, weight = list(torch.randn(4, 2, 100, 256, device="cuda")), torch.randn(256, 1024, device="cuda") / 32
    exact, errors = torch.cat(blocks, -1).double() @ weight.double().t(), []
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        with stf_kernels.use_backend("triton"):
            errors.append((stf_kernels.concat_linear(blocks, weight) - exact).abs().max().item())
    assert errors[0] < 1e-5 < errors[1] < 1e-2
