"""The specialisations that are compiled ahead of time, and the arguments of the launches that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..configs import GemmConfig
from ..configs.model import has_tma, others, tiles
from ..configs.tables import DTYPES, does_not_suit, shipped_configs
from ..ops import launch
from ..ops.weight_grad import wgrad_arguments
from ..tune.problems import PROBLEMS, Problem

_TRITON_TYPE = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}
_FEW_TILES = ("linear_merge", "linear_scatter")  # where a search splits K first


@dataclass(frozen=True)
class Case:
    """One specialisation of a segmented GEMM on one architecture."""

    arch: str
    problem: str
    dtype: str  # torch's name
    config: GemmConfig
    default: bool = False  # what serves when no table matches
    aligned: bool = True
    tf32: bool = False
    one_image: bool = False  # its rows have one pitch, so a descriptor's box is the whole tile

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else _TRITON_TYPE[getattr(torch, self.dtype)]
        more = {" unaligned": not self.aligned, " one image": self.one_image}
        words = "".join(word for word, holds in more.items() if holds)
        return f"{self.arch:7} {self.problem:14} {kind:4} {self.config!s:23}{words}"


def cases(arch: str, *, defaults_only: bool) -> Iterator[Case]:
    """Every shipped specialisation of an architecture, or of the defaults the aligned ones in bf16 and fp32."""
    for dtype in ("bfloat16", "float32") if defaults_only else DTYPES:
        for problem in PROBLEMS.values():
            for config in _defaults(problem, arch, DTYPES[dtype]):
                yield Case(arch, problem.name, dtype, config, default=True)
        if not defaults_only:
            yield from _others(arch, dtype)
    concat = Case(arch, "concat", "bfloat16", tiles(arch, 2)[-1], default=True)
    if defaults_only:
        yield replace(concat, aligned=False)


def _defaults(problem: Problem, arch: str, itemsize: int) -> tuple[GemmConfig, ...]:
    return () if problem.wgrad else tiles(arch, itemsize, save_pre=problem.save_pre)


def _others(arch: str, dtype: str) -> Iterator[Case]:
    itemsize = DTYPES[dtype]
    for name, problem in PROBLEMS.items():
        defaults = _defaults(problem, arch, itemsize)
        configs = shipped_configs(arch, dtype, wgrad=problem.wgrad)
        if problem.wgrad:
            configs = [*tiles(arch, itemsize, wgrad=True), *configs]
        elif problem.save_pre:
            configs = []
        else:
            configs += [config.portable() for config in configs]
            configs += [c for c in others(arch, itemsize) if c.form != "pointer" or name in _FEW_TILES]
        configs = [config for config in configs if does_not_suit(config, arch, problem.kind, itemsize) is None]
        for config in dict.fromkeys(config for config in configs if config not in defaults):
            yield Case(arch, name, dtype, config)
            if config.form == "tma" and problem.num_blocks > 1:
                yield Case(arch, name, dtype, config, one_image=True)
        for config in dict.fromkeys((*defaults, *configs)):
            case = Case(arch, name, dtype, config)
            if dtype == "float32":
                yield replace(case, tf32=True)
            if has_tma(arch, itemsize) and not problem.wgrad:  # where dependent launches are, too
                yield replace(case, config=replace(config, pdl=True))
            if problem.wgrad or (name == "concat" and config in defaults):
                yield replace(case, aligned=False)


def launch_of(case: Case) -> tuple[object, dict[str, object]]:
    """(kernel, its arguments by name): those of a real launch, made by the launcher itself from operands without
    memory, in the form of `codegen.compile_for`."""
    p, config, dtype = PROBLEMS[case.problem], case.config, getattr(torch, case.dtype)

    def draw(*shape: int) -> torch.Tensor:
        if case.aligned:
            return torch.empty(shape, dtype=dtype, device="meta")
        # An odd pitch is what keeps rows from being aligned, whatever the base address.
        return torch.empty((*shape[:-1], shape[-1] + 1), dtype=dtype, device="meta")[..., :-1]

    blocks, weight, bias = p.operands(draw, 1 if case.one_image else 8)
    m = blocks[0].shape[0] * p.tokens
    if p.wgrad:
        g, dw = draw(m, p.n), torch.empty_like(weight)
        kernel, _, operands, sizes, constants = wgrad_arguments(config, (tuple(blocks), g, dw), p.stage)
    else:
        y = torch.empty(
            (m, p.n) if p.index_rows else p.stage.out_shape(blocks[0].shape, p.n), dtype=dtype, device="meta"
        )
        pre = torch.empty((m, p.n), dtype=dtype, device="meta") if p.save_pre else None
        rows = torch.empty(m, dtype=torch.int64, device="meta") if p.index_rows else None
        tensors = tuple(blocks), weight, bias, y, pre, rows
        kernel, _, operands, sizes, constants = launch.ARGUMENTS[config.form](config, tensors, p.stage)
    # What the launcher reads off the process and the addresses, of which there are none here
    there = {"INPUT_PRECISION": "tf32" if case.tf32 else "ieee"}
    if dtype.itemsize == 2:
        there["FAST_ACTIVATION"] = 1 if case.arch.startswith("gfx") else 2
    if not case.aligned:
        there["ALIGNMENT"] = 1
    described = [_described(value, case.aligned) for value in (*operands, *sizes)]
    return kernel, dict(zip(kernel.arg_names, described, strict=False)) | constants | there


def _described(value: object, aligned: bool) -> object:
    """A tensor or a descriptor of one, as the compiler knows it; other values as they are."""
    from .codegen import Descriptor, Pointer

    if isinstance(value, tuple):
        return tuple(_described(item, aligned) for item in value)
    if isinstance(value, torch.Tensor):
        return Pointer(_TRITON_TYPE[value.dtype], aligned or value.dtype in (torch.int64, torch.int32))
    if hasattr(value, "block_shape"):
        return Descriptor(_TRITON_TYPE[value.base.dtype], tuple(value.block_shape))
    return value
