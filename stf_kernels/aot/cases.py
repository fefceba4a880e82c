"""The specialisations that are compiled ahead of time, and the arguments of the launches that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..configs import GemmConfig
from ..configs.model import has_tma, others, tiles
from ..configs.tables import DTYPES, does_not_suit, shipped_configs
from ..tune.problems import PROBLEMS, Problem

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
        kind = "tf32" if self.tf32 else self.dtype
        more = {" unaligned": not self.aligned, " one image": self.one_image}
        words = "".join(word for word, holds in more.items() if holds)
        return f"{self.arch:7} {self.problem:14} {kind:8} {self.config!s:23}{words}"


def cases(arch: str, *, defaults_only: bool) -> Iterator[Case]:
    """Every shipped specialisation of an architecture, or of the defaults the aligned ones in bf16 and fp32."""
    for dtype in ("bfloat16", "float32") if defaults_only else DTYPES:
        for problem in PROBLEMS.values():
            defaults = () if problem.wgrad else tiles(arch, DTYPES[dtype], save_pre=problem.save_pre)
            for config in defaults:
                yield Case(arch, problem.name, dtype, config, default=True)
            if not defaults_only:
                yield from _others(arch, dtype, problem, defaults)
    if defaults_only:
        yield Case(arch, "concat", "bfloat16", tiles(arch, 2)[-1], default=True, aligned=False)


def _others(arch: str, dtype: str, problem: Problem, defaults: tuple[GemmConfig, ...]) -> Iterator[Case]:
    itemsize = DTYPES[dtype]
    configs = shipped_configs(arch, dtype, wgrad=problem.wgrad)
    if problem.wgrad:
        configs = [*tiles(arch, itemsize, wgrad=True), *configs]
    elif problem.save_pre:
        configs = []
    else:
        configs += [config.portable() for config in configs]
        configs += [c for c in others(arch, itemsize) if c.form != "pointer" or problem.name in _FEW_TILES]
    configs = [config for config in configs if does_not_suit(config, arch, problem.kind, itemsize) is None]
    for config in dict.fromkeys((*defaults, *configs)):
        case = Case(arch, problem.name, dtype, config)
        if config not in defaults:
            yield case
            if config.form == "tma" and problem.num_blocks > 1:
                yield replace(case, one_image=True)
        if dtype == "float32" and not arch.startswith("gfx"):
            yield replace(case, tf32=True)
        # Where dependent launches are, too; they add the same instructions in float16.
        if has_tma(arch, itemsize) and dtype == "bfloat16" and not problem.wgrad:
            yield replace(case, config=replace(config, pdl=True))
        if problem.wgrad or (problem.name == "concat" and config in defaults):
            yield replace(case, aligned=False)


def launch_of(case: Case) -> tuple[Any, dict[str, Any]]:
    """(kernel, its arguments by name) of a real launch, made by the launcher itself from operands without memory."""
    problem, config, dtype = PROBLEMS[case.problem], case.config, getattr(torch, case.dtype)

    def draw(*shape: int) -> torch.Tensor:
        if case.aligned:
            return torch.empty(shape, dtype=dtype, device="meta")
        wide = torch.empty((*shape[:-1], shape[-1] + 1), dtype=dtype, device="meta")
        return wide[..., 1:]  # an odd pitch and address

    operands = problem.operands(draw, 1 if case.one_image else 8)
    kernel, _, tensors, sizes, constants = problem.arguments(config, *operands)
    # What the launcher reads off the process
    if case.tf32:
        constants["INPUT_PRECISION"] = "tf32"
    if case.arch.startswith("gfx") and not problem.wgrad:
        constants |= {"ALIGNMENT": 0, "FAST_ACTIVATION": min(constants["FAST_ACTIVATION"], 1)}
    return kernel, dict(zip(kernel.arg_names, (*tensors, *sizes), strict=False)) | constants
