"""pytest bench --benchmark-only: operators against their eager form, and in groups of their own memory and host time.

A benchmark checks its result against float64 before it is timed: twice the eager form's own error, as everywhere here.
The cold-cache, captured timings come from `python -m bench.kernels`. `-k memory -s` prints both peaks.
"""

import pytest
import torch

import reference
import stf_kernels

from . import host
from .agreement import relative_error
from .kernels.problems import LLAVA, Operands, Sizes, build_projector, random_blocks
from .kernels.providers import PROVIDERS
from .meters import MB, peak_bytes, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = LLAVA if DEVICE == "cuda" else Sizes(dim=256, out_dim=512, side=12)
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
BATCHES = (1, 8) if DEVICE == "cuda" else (1, 2)
OPERATORS = {"concat_linear": "concat", "spatial_merge_linear": "linear", "projector": "chain"}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads wait for each other longer than such shapes take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [*OPERATORS, "projector forward+backward"])
@pytest.mark.parametrize("provider", ["stf", "eager"])
def test_operator(benchmark, provider, what, dtype, batch):
    trains, stage = what not in OPERATORS, OPERATORS.get(what, "chain")
    with torch.no_grad():
        operands = Operands(SIZES, batch, device=DEVICE, dtype=dtype)
    operands.projector.requires_grad_(trains)
    x, (w, _) = operands.inputs[stage], operands.parameters["concat" if stage == "chain" else stage]
    shape = f"{len(x)}x{list(x[0].shape)}" if isinstance(x, list) else str(list(x.shape))
    benchmark.group = f"{what} {shape} x {list(w.shape)}, {dtype}"
    name = "stf-merge_in" if provider == "stf" and stage == "linear" else provider  # the public operator

    def call_of(name):
        call = PROVIDERS[name].call(operands, stage)
        return (lambda: operands.gradients(call)) if trains else call

    with torch.set_grad_enabled(trains):
        exact, call = operands.exact(stage, gradients=trains), call_of(name)
        allowed = 2 * relative_error(call_of("eager")(), exact) + 1e-6
        assert relative_error(call(), exact) <= allowed
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
    """LLaVA-1.5's sizes, batch 8, fp32, weights and inputs not counted. Forward: fused below reference, or a
    concatenation or an unfolded copy has come back."""
    factory = {"device": DEVICE, "dtype": torch.float32}
    blocks = random_blocks(LLAVA, 8, **factory)
    with torch.no_grad():
        modules = [build_projector(LLAVA, p.CompactTokenProjector, **factory) for p in (stf_kernels, reference)]

    def run(module):
        module.requires_grad_(training)
        y = module(blocks)
        loss = y.square().mean()
        if training:
            torch.autograd.grad(loss, list(module.parameters()))  # the tower is frozen: no blocks here
        return loss.detach()

    theirs, plain = peak_bytes(lambda: run(modules[1]), DEVICE)
    benchmark.group = f"peak memory, {'forward + backward' if training else 'forward'}, batch 8, fp32"
    ours, fused = benchmark.pedantic(lambda: peak_bytes(lambda: run(modules[0]), DEVICE), rounds=1)
    copied = LLAVA.copied_bytes(8, 4)
    benchmark.extra_info.update(fused_mb=fused / MB, reference_mb=plain / MB, copies_mb=copied / MB)
    with capsys.disabled():
        print(f"\n{benchmark.group}: fused {fused / MB:.0f} MB, reference {plain / MB:.0f} MB, difference "
              f"{(plain - fused) / MB:+.0f} MB (concatenation and unfold: {copied / MB:.0f} MB)")  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert training or fused < plain
