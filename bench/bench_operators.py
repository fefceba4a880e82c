"""pytest bench --benchmark-only: operators against their eager form, and in groups of their own memory and host time.

A benchmark checks its result against float64 before it is timed: twice the eager form's own error, as everywhere here.
The cold-cache, captured timings come from `python -m bench.kernels`. `-k memory -s` prints both peaks.
"""

import pytest
import torch

import reference
import stf_kernels

from . import host
from .kernels.problems import LLAVA, Operands, Sizes, build_projector, random_blocks
from .kernels.providers import PROVIDERS
from .meters import MB, peak_bytes, relative_error, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = LLAVA if DEVICE == "cuda" else Sizes(dim=256, out_dim=512, side=12)
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
# The public operators, by the product that they compute.
OPERATORS = {"concat_linear": "concat", "spatial_merge_linear": "linear", "projector": "chain"}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other longer than such shapes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        benchmark(lambda: (call(), synchronize(DEVICE)))


@pytest.mark.parametrize("case", list(host.cases(DEVICE)), ids=lambda case: case[0])
@pytest.mark.parametrize("provider", ["stf", "reference"])
def test_host_time(benchmark, provider, case):
    what, trains, (ours, theirs) = case
    benchmark.group = f"host time: {what}"
    with torch.set_grad_enabled(trains):
        benchmark(ours if provider == "stf" else theirs)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward_backward"])
def test_peak_memory(benchmark, training, capsys):
    """LLaVA-1.5's sizes, batch 8, fp32; weights and inputs are not counted. Fails when a fused forward is not below
    the reference's: a concatenation or an unfolded copy has come back."""
    factory = {"device": DEVICE, "dtype": torch.float32}
    blocks = random_blocks(LLAVA, 8, **factory)

    def peak(package):
        module = build_projector(LLAVA, package.CompactTokenProjector, **factory).requires_grad_(training)

        def run():
            loss = module(blocks).square().mean()
            if training:
                torch.autograd.grad(loss, list(module.parameters()))  # the tower is frozen: no blocks here
            return loss.detach()

        return peak_bytes(run, DEVICE)

    benchmark.group = f"peak memory, {'forward + backward' if training else 'forward'}, batch 8, fp32"
    (theirs, plain), (ours, fused) = peak(reference), benchmark.pedantic(peak, (stf_kernels,), rounds=1)
    figures = {"fused": fused, "reference": plain, "concatenation and unfold": 8 * 576 * 1024 * (8 + 1) * 4}
    benchmark.extra_info.update({f"{name} MB": size / MB for name, size in figures.items()})
    with capsys.disabled():
        print(f"\n{benchmark.group}:", ", ".join(f"{name} {size / MB:.0f} MB" for name, size in figures.items()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert training or fused < plain
