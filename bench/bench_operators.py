"""pytest bench --benchmark-only: each operator against its eager form. Small sizes on a CPU, LLaVA-1.5's on a GPU.

A benchmark checks its result against float64 before it is timed: 2x the eager form's own error, as everywhere here.
The cold-cache, captured timings that the README quotes come from `python -m bench.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import stf_kernels
from bench.agreement import relative_error
from bench.problems import (
    LLAVA,
    SMALL,
    build_projector,
    can_compile,
    eager_chain,
    eager_stage,
    random_blocks,
    stage_parameters,
)  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = LLAVA if DEVICE == "cuda" else SMALL
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
BATCHES = (1, 8) if DEVICE == "cuda" else (1, 2)


def synchronised(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call that ends when the device has finished, not when the host has asked."""
    if DEVICE == "cpu":
        return call

    def run() -> Tensor:
        result = call()
        torch.cuda.synchronize()
        return result

    return run


def operands(dtype: torch.dtype, batch: int) -> tuple[torch.nn.Module, list[Tensor], dict]:
    projector = build_projector(SIZES, stf_kernels.CompactTokenProjector, device=DEVICE, dtype=dtype, seed=1)
    projector.requires_grad_(False)
    blocks = random_blocks(SIZES, batch, device=DEVICE, dtype=dtype, seed=2)
    return projector, blocks, stage_parameters(projector)


def time_one(benchmark, provider: str, ours: Callable, eager: Callable, exact: Callable) -> None:
    expected = exact()
    allowed = 2 * relative_error(eager(), expected) + 1e-6
    assert relative_error(ours(), expected) <= allowed
    call = synchronised(eager if provider == "eager" else ours)
    call()
    benchmark.extra_info.update(device=DEVICE, provider=provider)
    benchmark(call)


def double(parameters: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [p.double() for p in parameters]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["stf", "eager"])
def test_concat_linear(benchmark, provider, dtype, batch):
    _, blocks, parameters = operands(dtype, batch)
    benchmark.group = f"concat_linear {dtype} batch {batch}"
    w, b = parameters["G1"]
    time_one(
        benchmark, provider,
        lambda: stf_kernels.concat_linear(blocks, w, b, activation="gelu", skip_tokens=1),
        lambda: eager_stage("G1", blocks, w, b, SIZES),
        lambda: eager_stage("G1", [x.double() for x in blocks], *double((w, b)), SIZES),
    )  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["stf", "eager"])
def test_spatial_merge_linear(benchmark, provider, dtype, batch):
    _, blocks, parameters = operands(dtype, batch)
    benchmark.group = f"spatial_merge_linear {dtype} batch {batch}"
    x = blocks[0][:, 1:].contiguous()
    w, b = parameters["G3"]
    time_one(
        benchmark, provider,
        lambda: stf_kernels.spatial_merge_linear(x, w, b, grid=(SIZES.grid, SIZES.grid), activation="gelu"),
        lambda: eager_stage("G3", x, w, b, SIZES),
        lambda: eager_stage("G3", x.double(), *double((w, b)), SIZES),
    )  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["stf", "eager"])
def test_projector(benchmark, provider, dtype, batch):
    projector, blocks, parameters = operands(dtype, batch)
    benchmark.group = f"projector {dtype} batch {batch}"
    with torch.no_grad():
        time_one(
            benchmark, provider,
            lambda: projector(blocks),
            lambda: eager_chain(blocks, parameters, SIZES),
            lambda: eager_chain([x.double() for x in blocks], {k: double(p) for k, p in parameters.items()}, SIZES),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", ["stf", "eager", "compile"] if can_compile(DEVICE) else ["stf", "eager"])
def test_projector_forward_backward(benchmark, provider, dtype):
    """Training with a frozen tower: gradients of the projector's parameters only. compile: torch.compile of eager."""
    batch = BATCHES[-1]
    projector, blocks, parameters = operands(dtype, batch)
    projector.requires_grad_(True)
    benchmark.group = f"projector forward+backward {dtype} batch {batch}"
    weights = [p for pair in parameters.values() for p in pair]

    def gradients(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Flattened and joined for the comparison; the same small cost on both sides.
        return lambda: torch.cat([g.flatten() for g in torch.autograd.grad(forward().square().mean(), weights)])

    def exact() -> Tensor:
        doubles = {k: [p.detach().double().requires_grad_() for p in pair] for k, pair in parameters.items()}
        y = eager_chain([x.double() for x in blocks], doubles, SIZES)
        leaves = [p for pair in doubles.values() for p in pair]
        return torch.cat([g.flatten() for g in torch.autograd.grad(y.square().mean(), leaves)])

    torch.compiler.reset()
    compiled = torch.compile(eager_chain, dynamic=False)
    ours = (lambda: compiled(blocks, parameters, SIZES)) if provider == "compile" else lambda: projector(blocks)
    time_one(benchmark, provider, gradients(ours), gradients(lambda: eager_chain(blocks, parameters, SIZES)), exact)
