"""Who computes a stage: this library's paths and their rivals, all on the same operands.

stf               the public operator or module, default path
stf-triton        the same with use_backend("triton"): differs where the device's table names cuBLAS
stf-merge-store   G2 as the chain runs it: rows written in the merged layout
stf-dense         G3 as the chain runs it: on tokens that are already merged
stf-<tile>        the kernel with one of the heuristic's tiles; -k4: its split-K form, where tiles are few;
                  -tma, -swapped: the Hopper forms (kernels/descriptor.py, kernels/swapped.py)
stf-direct        the chain launched without the JIT's argument binding (STF_KERNELS_DIRECT_LAUNCH=1)
stf-pdl           the chain with programmatic dependent launches (STF_KERNELS_PDL=1)
stf-predicted     the chain with the configuration that the tuner's cost model puts first at each stage; -pdl: both
eager             plain PyTorch: cat, gather, F.linear, GELU
                  the other rivals: rivals.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .operands import Operands, flat
from .plan import COMPILED
from .problems import STAGES, merge
from .rivals import compiled, rival, rivals_of

# Of a forward + backward: what autograd can differentiate. Of ours the default path, and Triton alone: its weight
# gradient copies no cropped block (ops/weight_grad.py).
DIFFERENTIABLE = ("eager", "stf", "stf-triton", "strided", "conv2d", *COMPILED)


@dataclass
class Provider:
    """A name, the call, and how its result is brought into the stage's own layout before it is compared."""

    name: str
    call: Callable[[], Any]
    layout: Callable[[Any], Tensor] = lambda y: y


def providers(stage: str, operands: Operands) -> list[Provider]:
    """`eager` first, then the default path and the rivals that torch need not compile."""
    import stf_kernels

    sizes = operands.sizes
    found = [Provider("eager", lambda: operands.eager(stage))]
    if stage == "chain":
        ours: Callable[[], Tensor] = lambda: operands.projector(operands.blocks)  # noqa: E731
    else:
        x, (w, b) = operands.inputs[stage], operands.parameters[stage]
        ours = {
            "G1": lambda: stf_kernels.concat_linear(x, w, b, activation="gelu", skip_tokens=1),
            "G2": lambda: stf_kernels.concat_linear([x], w, b),
            "G3": lambda: stf_kernels.spatial_merge_linear(
                x, w, b, grid=(sizes.grid, sizes.grid), merge_size=sizes.merge, activation="gelu"
            ),
            "G4": lambda: stf_kernels.concat_linear([x], w, b),
        }[stage]
    found.append(Provider("stf", ours))
    for name in rivals_of(stage):
        found += _guarded(name, lambda name=name: [Provider(name, rival(name, stage, operands))])
    if stage == "G2":
        found += _guarded("stf-merge-store", lambda: [_merge_store(operands)])
    if stage == "G3":
        found += _guarded("stf-dense", lambda: [_dense(operands)])
    if operands.blocks[0].is_cuda:
        found.append(Provider("stf-triton", _forced(ours)))
    return found


def compiled_provider(name: str, stage: str, operands: Operands) -> Provider:
    [provider] = _guarded(name, lambda: [Provider(name, compiled(name, stage, operands))])
    return provider


def own_providers(stage: str, operands: Operands) -> list[Provider]:
    """Own paths that are no default: the chain one switch away, a stage by each of our tiles; none on a CPU."""
    if not operands.blocks[0].is_cuda:
        return []
    if stage != "chain":
        return _guarded("stf-tiles", lambda: _tiles(stage, operands))

    def chain() -> Tensor:
        return operands.projector(operands.blocks)

    def direct() -> list[Provider]:
        call = _with_flag("STF_KERNELS_DIRECT_LAUNCH", chain)
        call()  # the first launch of a kernel goes through the JIT; what is compared and timed must not
        return [Provider("stf-direct", call)]

    found = [*_guarded("stf-direct", direct), Provider("stf-pdl", _with_flag("STF_KERNELS_PDL", chain))]
    return found + _guarded("stf-predicted", lambda: _predicted(operands))


def with_backward(found: list[Provider], stage: str, operands: Operands) -> list[Provider]:
    """Forward + backward of those that autograd can differentiate; the operands must require gradients."""

    def one(p: Provider) -> Provider:
        return Provider(p.name, lambda: operands.gradients(stage, p.call), flat)

    return [one(p) for p in found if p.name in DIFFERENTIABLE]


def _guarded(name: str, build: Callable[[], list[Provider]]) -> list[Provider]:
    """A provider that cannot even be set up is a failed row of its own, not the end of the table."""
    try:
        return build()
    except Exception as error:
        failure = error

        def fail() -> Tensor:
            raise failure

        return [Provider(name, fail)]


def _forced(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    import stf_kernels

    def run() -> Tensor:
        with stf_kernels.use_backend("triton"):
            return call()

    return run


def _with_flag(name: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            return call()
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    return run


def _predicted(operands: Operands) -> list[Provider]:
    """The four stages with explicit configurations: what a measured table could make the default."""
    import triton

    from stf_kernels.ops.launch import launch_stage
    from stf_kernels.ops.stage import Stage
    from stf_kernels.problems import PROBLEMS
    from stf_kernels.tuning.candidates import candidates, forms_for
    from stf_kernels.tuning.lookup import device_identity

    index = torch.cuda.current_device()
    arch, processors = device_identity(index)[1], torch.cuda.get_device_properties(index).multi_processor_count
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    sizes, x = operands.sizes, [block[:, 1:] for block in operands.blocks]
    stages = (Stage("gelu"), Stage(scatter=sizes.merge, grid=(sizes.grid, sizes.grid)), Stage("gelu"), Stage())
    steps = []
    for name, stage in zip(STAGES, stages, strict=True):
        w, b = operands.parameters[name]
        itemsize = w.element_size()
        config = candidates(
            *sizes.gemm(name, operands.batch), itemsize,
            shared_limit=shared, multiprocessors=processors, splits=(1,) if arch.startswith("gfx") else (1, 2, 4, 8),
            forms=forms_for(PROBLEMS["concat" if name == "G1" else "linear"], arch, itemsize),
        )[0]  # fmt: skip
        steps.append((w, b, stage, config))

    def call() -> Tensor:
        y = x
        for step in steps:
            y = [launch_stage(y, *step)[0]]
        return y[0]

    return [Provider("stf-predicted", call), Provider("stf-predicted-pdl", _with_flag("STF_KERNELS_PDL", call))]


def _merge_store(operands: Operands) -> Provider:
    from stf_kernels.ops.chain import run_stage
    from stf_kernels.ops.stage import Stage, unmerge_windows

    sizes, x, (w, b) = operands.sizes, operands.inputs["G2"], operands.parameters["G2"]
    grid = (sizes.grid, sizes.grid)
    stage = Stage(scatter=sizes.merge, grid=grid)
    return Provider(
        "stf-merge-store", lambda: run_stage([x], w, b, stage)[0], lambda y: unmerge_windows(y, grid, sizes.merge)
    )


def _dense(operands: Operands) -> Provider:
    import stf_kernels

    w, b = operands.parameters["G3"]
    merged = merge(operands.inputs["G3"], operands.sizes)
    return Provider("stf-dense", lambda: stf_kernels.concat_linear([merged], w, b, activation="gelu"))


def _tiles(stage: str, operands: Operands) -> list[Provider]:
    from stf_kernels.ops.launch import launch_stage
    from stf_kernels.ops.stage import Stage
    from stf_kernels.tuning.heuristic import descriptor_tiles, split_tiles, swapped_tiles, tiles
    from stf_kernels.tuning.lookup import device_identity

    arch = device_identity(torch.cuda.current_device())[1]
    sizes, x, (w, b) = operands.sizes, operands.inputs[stage], operands.parameters[stage]
    if stage == "G3":
        geometry = Stage("gelu", gather=sizes.merge, grid=(sizes.grid, sizes.grid))
    else:
        geometry = Stage("gelu" if stage == "G1" else None)
    blocks = [block[:, 1:] for block in x] if stage == "G1" else [x]
    itemsize = w.element_size()
    configs = list(tiles(arch, itemsize))
    if stage in ("G2", "G4") and operands.batch <= 2:  # too few tiles for the GPU: here the K axis is worth splitting
        configs += [config for config in split_tiles(arch, itemsize) if config.split_k == 4]
    if stage != "G3":
        configs += descriptor_tiles(arch, itemsize)
    if stage in ("G2", "G4"):
        configs += swapped_tiles(arch, itemsize)
    return [
        Provider(_tile_name(config), lambda config=config: launch_stage(blocks, w, b, geometry, config, strict=True)[0])
        for config in configs
    ] + (_dense_tiles(operands, arch) if stage == "G3" else [])


def _dense_tiles(operands: Operands, arch: str) -> list[Provider]:
    """G3 as the chain runs it, on tokens that are already merged, with the Hopper forms."""
    from stf_kernels.ops.launch import launch_stage
    from stf_kernels.ops.stage import Stage
    from stf_kernels.tuning.heuristic import descriptor_tiles, swapped_tiles

    w, b = operands.parameters["G3"]
    merged = merge(operands.inputs["G3"], operands.sizes)
    return [
        Provider(
            _tile_name(config).replace("stf-", "stf-dense-", 1),
            lambda config=config: launch_stage([merged], w, b, Stage("gelu"), config, strict=True)[0],
        )
        for config in (*descriptor_tiles(arch, w.element_size()), *swapped_tiles(arch, w.element_size()))
    ]


def _tile_name(config) -> str:
    rows = f"{config.block_m}+{config.tail_m}" if config.tail_m else str(config.block_m)
    split = f"-k{config.split_k}" if config.split_k > 1 else ""
    form = {"pointers": "", "descriptors": "-tma", "swapped": "-swapped"}[config.form]
    return f"stf-{rows}x{config.block_n}x{config.block_k}-w{config.num_warps}-s{config.num_stages}{split}{form}"
