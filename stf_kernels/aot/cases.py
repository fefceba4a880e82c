"""The specialisations that are compiled ahead of time, and the arguments of the launches that they stand for.

Problems are the stages of LLaVA-STF at the sizes of LLaVA-1.5-7B.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..configs import GemmConfig
from ..configs.model import does_not_suit, has_tma, others, tiles
from ..configs.tables import DTYPES, shipped_configs
from ..ops import launch, weight_grad
from ..ops.segments import Stage


@dataclass(frozen=True)
class Problem:
    """One segmented GEMM, or its weight gradient (wgrad). tokens: GEMM rows per image; index_rows: the last stage."""

    name: str
    stage: Stage
    num_blocks: int
    c: int
    n: int
    tokens: int
    save_pre: bool = False
    index_rows: bool = False
    wgrad: bool = False

    @property
    def kind(self) -> str:
        """The name under which tuning tables know it."""
        return self.stage.kind(self.num_blocks) + ("_wgrad" if self.wgrad else "")

    @property
    def k(self) -> int:
        return self.num_blocks * self.stage.merge_in**2 * self.c


_GRID = (24, 24)

PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("concat", Stage("gelu"), 8, 1024, 4096, 576),
        Problem("linear_merge", Stage(merge_out=2, grid=_GRID), 1, 4096, 1024, 576),
        Problem("linear", Stage("gelu"), 1, 4096, 16384, 144),
        Problem("merge", Stage("gelu", merge_in=2, grid=_GRID), 1, 1024, 16384, 144),
        Problem("linear_scatter", Stage(), 1, 16384, 4096, 144, index_rows=True),
        Problem("concat_train", Stage("gelu"), 8, 1024, 4096, 576, save_pre=True),
        Problem("linear_train", Stage("gelu"), 1, 4096, 16384, 144, save_pre=True),
        Problem("concat_wgrad", Stage(), 8, 1024, 4096, 576, wgrad=True),
        Problem("merge_wgrad", Stage(merge_in=2, grid=_GRID), 1, 1024, 16384, 144, wgrad=True),
    )
}


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
        few_tiles = problem.name in ("linear_merge", "linear_scatter")  # where a search splits K first
        configs += [config for config in others(arch, itemsize) if config.form != "pointer" or few_tiles]
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
    """(kernel, its arguments by name) of a real launch, made by the launcher itself from operands without memory: those
    of the chain, the tower's blocks with CLS cut off by a view; for a weight gradient what the library would copy."""
    problem, config, stage = PROBLEMS[case.problem], case.config, PROBLEMS[case.problem].stage

    def empty(*shape: int) -> Tensor:
        odd = 0 if case.aligned else 1  # an odd pitch and address
        return torch.empty((*shape[:-1], shape[-1] + odd), dtype=getattr(torch, case.dtype), device="meta")[..., odd:]

    batch, skip = 1 if case.one_image else 8, 1 if problem.num_blocks > 1 or problem.wgrad else 0
    m, tokens = batch * problem.tokens, problem.tokens * stage.merge_in**2
    blocks = tuple(empty(batch, tokens + skip, problem.c)[:, skip:] for _ in range(problem.num_blocks))
    x, weight, bias = blocks[0], empty(problem.n, problem.k), empty(problem.n)
    if problem.wgrad:
        results = x.new_empty(m, problem.n), x.new_empty(weight.shape)
        kernel, _, tensors, sizes, constants = weight_grad.wgrad_arguments(config, (blocks, *results), stage)
    else:
        y = x.new_empty((m, problem.n) if problem.index_rows else stage.out_shape(x.shape, problem.n))
        pre = x.new_empty(m, problem.n) if problem.save_pre else None
        rows = x.new_empty(m, dtype=torch.int64) if problem.index_rows else None
        operands = blocks, weight, bias, y, pre, rows
        kernel, _, tensors, sizes, constants = launch.ARGUMENTS[config.form](config, operands, stage)
    # What the launcher reads off the process
    if case.tf32:
        constants["INPUT_PRECISION"] = "tf32"
    if case.arch.startswith("gfx") and not problem.wgrad:
        constants |= {"ALIGNMENT": 0, "FAST_ACTIVATION": min(constants["FAST_ACTIVATION"], 1)}
    return kernel, dict(zip(kernel.arg_names, (*tensors, *sizes), strict=False)) | constants
