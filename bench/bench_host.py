"""Host time of a call: what the operators add to the bare stages, in microseconds.

Tensors so small that the arithmetic is nothing: what is left is Python. Each benchmark times the public call, and
its `extra_info` holds the bare stages (no checks, no dispatch) timed beside it in the same process, and the
difference: without gradients, and as in training, where the bare stages write their pre-activations too and the call
makes a node of autograd's graph. The dispatcher's own path, which a call outside torch.compile goes around, is there
to compare.
"""

import time
from collections.abc import Callable

import pytest
import torch

import stf_kernels
from stf_kernels.ops.chain import run_stage
from stf_kernels.ops.stage import Stage

GRID = (4, 4)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def microseconds(call: Callable[[], object]) -> float:
    """Best of 300 batches of 10 calls, in this thread's own time: what else the machine does only ever adds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    best = float("inf")
    for _ in range(300):
        began = time.thread_time()
        for _ in range(10):
            call()
        best = min(best, time.thread_time() - began)
    return best * 1e6 / 10


def compare(
    benchmark, public: Callable[[], object], bare: Callable[[bool], object], dispatched: Callable | None
) -> None:
    """bare: takes whether pre-activations are written."""
    with torch.no_grad():
        benchmark.extra_info["bare_us"] = without = microseconds(lambda: bare(False))
        benchmark.extra_info["call_us"] = call = microseconds(public)
        benchmark.extra_info["added_us"] = call - without
        training_bare = microseconds(lambda: bare(True))
        text = f"\nhost: bare {without:.1f} us, call {call:.1f} us, added {call - without:.1f} us"
        if dispatched is not None:
            benchmark.extra_info["dispatcher_us"] = through = microseconds(dispatched)
            text += f", through the dispatcher {through - without:.1f} us"
        benchmark.pedantic(public, rounds=30, iterations=100)
    training = microseconds(public)
    benchmark.extra_info.update(training_us=training, training_added_us=training - training_bare)
    print(f"{text}; in training added {training - training_bare:.1f} us")


def test_concat_linear(benchmark):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = [torch.randn(1, 4, 16, device=device) for _ in range(8)]
    weight, bias = torch.randn(16, 128, device=device, requires_grad=True), torch.randn(16, device=device)
    stage = Stage("gelu")
    compare(
        benchmark,
        lambda: stf_kernels.concat_linear(blocks, weight, bias, activation="gelu"),
        lambda save: run_stage(blocks, weight, bias, stage, save_pre=save),
        lambda: torch.ops.stf_kernels.concat_linear(blocks, weight, bias, "gelu", 0, []),
    )


def test_spatial_merge_linear(benchmark):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.randn(1, 16, 16, device=device), torch.randn(16, 64, device=device, requires_grad=True)
    stage = Stage("gelu", gather=2, grid=GRID)
    compare(
        benchmark,
        lambda: stf_kernels.spatial_merge_linear(x, weight, grid=GRID, activation="gelu"),
        lambda save: run_stage([x], weight, None, stage, save_pre=save),
        lambda: torch.ops.stf_kernels.spatial_merge_linear(x, weight, None, "gelu", 0, 2, *GRID, []),
    )


def test_projector(benchmark):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    projector = stf_kernels.CompactTokenProjector(8, 16, 16, device=device)
    blocks = [torch.randn(1, 16, 16, device=device) for _ in range(8)]
    stages = (Stage("gelu"), Stage(scatter=2, grid=GRID), Stage("gelu"), Stage())
    layers = [layer for child in (projector.mbtf, projector.stf) for layer in (child.linear_1, child.linear_2)]
    operands = [(layer.weight, layer.bias, stage) for layer, stage in zip(layers, stages, strict=True)]

    def bare(save: bool) -> torch.Tensor:
        x = blocks
        for weight, bias, stage in operands:
            x = [run_stage(x, weight, bias, stage, save_pre=save and stage.activation is not None)[0]]
        return x[0]

    compare(benchmark, lambda: projector(blocks), bare, None)
