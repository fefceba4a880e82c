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
compile           torch.compile of that, max-autotune without its own CUDA graphs
conv2d            G3 as cuDNN's convolution of window 2, stride 2, on channels_last
addmm_activation  cuBLASLt's epilogue; its GELU is tanh on CUDA, an error that is reported and not hidden
strided           G1 as one cuBLAS operand over a preallocated [B, 577, 8, C] buffer that the tower would fill
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problems import STAGES, Sizes, eager_chain, eager_stage, merge, random_blocks, stage_parameters

TANH = "addmm_activation"


@dataclass
class Provider:
    """A name, the call, and how its result is brought into the stage's own layout before it is compared."""

    name: str
    call: Callable[[], Tensor]
    layout: Callable[[Tensor], Tensor] = lambda y: y


class Operands:
    """Inputs of every stage at one batch size and dtype: each stage reads the eager output of the one before."""

    def __init__(self, projector: nn.Module, sizes: Sizes, batch: int, *, device: str, dtype: torch.dtype) -> None:
        self.projector, self.sizes, self.batch = projector, sizes, batch
        self.parameters = stage_parameters(projector)
        self.blocks = random_blocks(sizes, batch, device=device, dtype=dtype, seed=batch)
        self.inputs: dict[str, list[Tensor] | Tensor] = {"G1": self.blocks}
        x: list[Tensor] | Tensor = self.blocks
        for stage, following in itertools.pairwise(STAGES):
            x = self.inputs[following] = eager_stage(stage, x, *self.parameters[stage], sizes)

    def exact(self, stage: str) -> Tensor:
        """float64 from the operands as they are, in the stage's layout."""
        parameters = {name: tuple(p.double() for p in pair) for name, pair in self.parameters.items()}
        if stage == "chain":
            return eager_chain([block.double() for block in self.blocks], parameters, self.sizes)
        x = self.inputs[stage]
        x = [block.double() for block in x] if isinstance(x, list) else x.double()
        return eager_stage(stage, x, *parameters[stage], self.sizes)


def providers(stage: str, operands: Operands, *, tiles: bool = True) -> list[Provider]:
    """Everything but torch.compile, cheapest to set up first; `eager` is always there."""
    import stf_kernels

    sizes = operands.sizes
    gpu = operands.blocks[0].is_cuda
    if stage == "chain":
        ours: Callable[[], Tensor] = lambda: operands.projector(operands.blocks)  # noqa: E731
        found = [
            Provider("eager", lambda: eager_chain(operands.blocks, operands.parameters, sizes)),
            Provider("stf", ours),
        ]
        if not gpu:
            return found
        found += [
            Provider("stf-triton", _forced(ours)),
            Provider("stf-direct", _with_flag("STF_KERNELS_DIRECT_LAUNCH", ours)),
            Provider("stf-pdl", _with_flag("STF_KERNELS_PDL", ours)),
        ]
        return found + _guarded("stf-predicted", lambda: _predicted(operands))
    x, (w, b) = operands.inputs[stage], operands.parameters[stage]
    ours = {
        "G1": lambda: stf_kernels.concat_linear(x, w, b, activation="gelu", skip_tokens=1),
        "G2": lambda: stf_kernels.concat_linear([x], w, b),
        "G3": lambda: stf_kernels.spatial_merge_linear(
            x, w, b, grid=(sizes.grid, sizes.grid), merge_size=sizes.merge, activation="gelu"
        ),
        "G4": lambda: stf_kernels.concat_linear([x], w, b),
    }[stage]
    found = [Provider("eager", lambda: eager_stage(stage, x, w, b, sizes)), Provider("stf", ours)]
    if gpu:
        found.append(Provider("stf-triton", _forced(ours)))
    extra: dict[str, Callable[[], list[Provider]]] = {}
    if stage == "G2":
        extra["stf-merge-store"] = lambda: [_merge_store(operands)]
    if stage == "G3":
        extra |= {"stf-dense": lambda: [_dense(operands)], "conv2d": lambda: [_conv2d(operands)]}
    if stage in ("G1", "G3"):
        extra[TANH] = lambda: [_addmm_activation(stage, operands)]
    if stage == "G1":
        extra["strided"] = lambda: [_strided(operands)]
    if gpu and tiles:
        extra["stf-tiles"] = lambda: _tiles(stage, operands)
    return found + [provider for name, build in extra.items() for provider in _guarded(name, build)]


def _guarded(name: str, build: Callable[[], list[Provider]]) -> list[Provider]:
    """A provider that cannot even be set up is a failed row of its own, not the end of the table."""
    try:
        return build()
    except Exception as error:
        failure = error

        def fail() -> Tensor:
            raise failure

        return [Provider(name, fail)]


def compiled(stage: str, operands: Operands) -> Provider:
    """torch.compile of the eager form. Building it takes seconds to minutes: measured last, while time is left."""
    sizes, parameters = operands.sizes, operands.parameters
    options = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
    if stage == "chain":
        chain = torch.compile(lambda blocks: eager_chain(blocks, parameters, sizes), **options)
        return Provider("compile", lambda: chain(operands.blocks))
    x, (w, b) = operands.inputs[stage], parameters[stage]
    one = torch.compile(lambda x: eager_stage(stage, x, w, b, sizes), **options)
    return Provider("compile", lambda: one(x))


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
    from stf_kernels.tuning.lookup import device_identity
    from stf_kernels.tuning.search import candidates, forms_for

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


def _conv2d(operands: Operands) -> Provider:
    sizes, x, (w, b) = operands.sizes, operands.inputs["G3"], operands.parameters["G3"]
    # W[n, (dy dx c)] as a kernel [n, c, dy, dx]; tokens [B, H*W, C] are an image in channels_last as they lie.
    kernel = w.view(w.shape[0], sizes.merge, sizes.merge, sizes.dim).permute(0, 3, 1, 2)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    image = x.transpose(1, 2).unflatten(2, (sizes.grid, sizes.grid))

    def call() -> Tensor:
        return F.gelu(F.conv2d(image, kernel, b, stride=sizes.merge))

    return Provider("conv2d", call, lambda y: y.flatten(2).transpose(1, 2))


def _addmm_activation(stage: str, operands: Operands) -> Provider:
    sizes, x, (w, b) = operands.sizes, operands.inputs[stage], operands.parameters[stage]
    batch = operands.batch

    def call() -> Tensor:
        a = torch.cat([block[:, 1:] for block in x], -1) if stage == "G1" else merge(x, sizes)
        return torch._addmm_activation(b, a.flatten(0, 1), w.t(), use_gelu=True)

    return Provider(TANH, call, lambda y: y.unflatten(0, (batch, -1)))


def _strided(operands: Operands) -> Provider:
    w, b = operands.parameters["G1"]
    buffer = torch.stack(operands.blocks, dim=2).flatten(2)  # [B, 577, 8*C], filled before the clock starts
    return Provider("strided", lambda: F.gelu(F.linear(buffer[:, 1:], w, b)))


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
