"""pytest bench --benchmark-only: operators against their eager form, warm; "peak MB" is in its --benchmark-json.

A benchmark checks its result against float64 before it is timed: twice the eager form's own error, as everywhere here.
Cold-cache, captured timings come from `python -m bench.kernels`, host time and memory at real sizes from `bench.host`.
"""

import pytest
import torch

from .kernels.problems import LLAVA, Operands, Sizes
from .kernels.providers import PROVIDERS
from .meters import MB, peak_bytes, relative_error, synchronize

torch.set_num_threads(1)  # two wait for each other longer than such shapes take
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = LLAVA if DEVICE == "cuda" else Sizes(dim=256, out_dim=512, side=12)
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
# The public operators, by the product that they compute.
OPERATORS = {"concat_linear": "concat", "spatial_merge_linear": "linear", "projector": "chain"}


@pytest.mark.parametrize("batch", [1, 8] if DEVICE == "cuda" else [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [*OPERATORS, "projector forward+backward"])
@pytest.mark.parametrize("provider", ["stf", "eager"])
def test_operator(benchmark, provider, what, dtype, batch):
    trains, stage = what not in OPERATORS, OPERATORS.get(what, "chain")
    operands = Operands(SIZES, batch, device=DEVICE, dtype=dtype)
    operands.projector.requires_grad_(trains)
    x, n = operands.inputs[stage], operands.parameters["linear_scatter" if stage == "chain" else stage][0].shape[0]
    shape = f"{len(x)} x {list(x[0].shape)}" if isinstance(x, list) else str(list(x.shape))
    benchmark.group = f"{what} {shape} -> {n}, {dtype}"

    def call_of(name):
        call = PROVIDERS[name].call(operands, stage)
        return (lambda: operands.gradients(call)) if trains else call

    with torch.set_grad_enabled(trains):
        call = call_of("stf-merge_in" if (provider, stage) == ("stf", "linear") else provider)
        exact = operands.exact(stage, gradients=trains)
        assert relative_error(call(), exact) <= 2 * relative_error(call_of("eager")(), exact) + 1e-6
        benchmark.extra_info["peak MB"] = peak_bytes(call, DEVICE)[1] / MB
        benchmark(lambda: (call(), synchronize(DEVICE)))
