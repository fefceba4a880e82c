"""The specialisations that are compiled ahead of time, the arguments of the launches that they stand for, and what is
asserted of the code: the sentences of `violations`. One for memory that is not 16-byte aligned need only fit."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..configs import GemmConfig
from ..configs.model import ARCHITECTURES, SHARED_MEMORY_LIMIT, does_not_suit, has_tma, others, tiles
from ..configs.tables import DTYPES, shipped_configs
from ..ops import launch
from ..ops.segments import Stage


@dataclass(frozen=True)
class Problem:
    """One segmented GEMM. tokens: GEMM rows per image; index_rows: the last stage."""

    name: str
    stage: Stage
    num_blocks: int
    c: int
    n: int
    tokens: int
    save_pre: bool = False
    index_rows: bool = False

    @property
    def kind(self) -> str:
        return self.stage.kind(self.num_blocks)

    @property
    def k(self) -> int:
        return self.num_blocks * self.stage.merge_in**2 * self.c


_GRID = (24, 24)

# The stages of LLaVA-STF at the sizes of LLaVA-1.5-7B
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
        words = " unaligned" * (not self.aligned) + " one image" * self.one_image
        return f"{self.arch:7} {self.problem:14} {kind:8} {self.config!s:23}{words}"


def cases(arch: str, *, defaults_only: bool) -> Iterator[Case]:
    """Every shipped specialisation of an architecture, or of the defaults the aligned ones in bf16 and fp32."""
    for dtype in ("bfloat16", "float32") if defaults_only else DTYPES:
        for problem in PROBLEMS.values():
            defaults = tiles(arch, DTYPES[dtype], save_pre=problem.save_pre)
            for config in defaults:
                yield Case(arch, problem.name, dtype, config, default=True)
            if not defaults_only:
                yield from _others(arch, dtype, problem, defaults)
    if defaults_only:
        yield Case(arch, "concat", "bfloat16", tiles(arch, 2)[-1], default=True, aligned=False)


def _others(arch: str, dtype: str, problem: Problem, defaults: tuple[GemmConfig, ...]) -> Iterator[Case]:
    itemsize = DTYPES[dtype]
    configs: list[GemmConfig] = []
    if not problem.save_pre:
        configs += shipped_configs(arch, dtype)
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
        if has_tma(arch, itemsize) and dtype == "bfloat16":
            yield replace(case, config=replace(config, pdl=True))
        if problem.name == "concat" and config in defaults:
            yield replace(case, aligned=False)


def launch_of(case: Case) -> tuple[Any, dict[str, Any]]:
    """(kernel, its arguments by name) of a real launch, made by the launcher itself from operands without memory: those
    of the chain, the tower's blocks with CLS cut off by a view."""
    problem, config, stage = PROBLEMS[case.problem], case.config, PROBLEMS[case.problem].stage

    def empty(*shape: int) -> Tensor:
        odd = 0 if case.aligned else 1  # an odd pitch and address
        return torch.empty((*shape[:-1], shape[-1] + odd), dtype=getattr(torch, case.dtype), device="meta")[..., odd:]

    batch, skip = 1 if case.one_image else 8, 1 if problem.num_blocks > 1 else 0
    m, tokens = batch * problem.tokens, problem.tokens * stage.merge_in**2
    blocks = tuple(empty(batch, tokens + skip, problem.c)[:, skip:] for _ in range(problem.num_blocks))
    x, weight, bias = blocks[0], empty(problem.n, problem.k), empty(problem.n)
    y = x.new_empty((m, problem.n) if problem.index_rows else stage.out_shape(x.shape, problem.n))
    pre = x.new_empty(m, problem.n) if problem.save_pre else None
    rows = x.new_empty(m, dtype=torch.int64) if problem.index_rows else None
    operands = blocks, weight, bias, y, pre, rows
    kernel, _, tensors, sizes, constants = launch.ARGUMENTS[config.form](config, operands, stage)
    # What the launcher reads off the process
    if case.tf32:
        constants["INPUT_PRECISION"] = "tf32"
    if case.arch.startswith("gfx"):
        constants |= {"ALIGNMENT": 0, "FAST_ACTIVATION": min(constants["FAST_ACTIVATION"], 1)}
    return kernel, dict(zip(kernel.arg_names, (*tensors, *sizes), strict=False)) | constants


def examine(case: Case) -> tuple[str, list[str], dict | None]:
    """Compile one case -> (its line of the report, its violations, its record for --json)."""
    from .codegen import compile_for

    try:
        kernel, arguments = launch_of(case)
        code = compile_for(case.arch, kernel, arguments, **case.config.compiler_options())
    except Exception as error:  # the compiler raises what it likes; a case that does not compile is a violation
        return f"{case}  does not compile", [f"does not compile: {error!s:.300}"], None
    allowed = " (allowed: unaligned)" if code.spills and not case.aligned else ""
    line = (
        f"{case}  registers {code.registers:3}  spilled {code.spills:3}{allowed}  shared {code.shared:6}  "
        f"tensor-core {code.tensor_core:3}  loop: async {code.loop['async_copies']:2}, plain {code.plain_copies:3}"
    )
    record = asdict(case) | asdict(code) | {"config": str(case.config)}
    record["loop"] |= dict(zip(("issue_cycles", "tensor_cycles"), cycles(case, code), strict=True))
    return line, violations(case, code), record


def violations(case: Case, code) -> list[str]:
    """What is wrong with the compiled code, one sentence each; [] if nothing is."""
    nvidia, warpgroups = case.arch.startswith("sm_"), case.arch in ("sm_90", "sm_100")
    limit = SHARED_MEMORY_LIMIT[case.arch]
    wrong = {f"shared memory {code.shared} bytes, the limit of {case.arch} is {limit}": code.shared > limit}
    if case.aligned:
        ieee = nvidia and case.dtype == "float32" and not case.tf32  # has none
        wrong |= {
            # Two words that lie there from before the loop until behind it cost nothing; ptxas of Triton 3.9 does so.
            f"{code.spills} spilled, {code.stack_accesses} times read or written in the loop": code.stack_accesses
            or code.spills > (8 if nvidia else 0),
            "no tensor-core instruction": not code.tensor_core and not ieee,
            # Only the few steps of a share of K may be unrolled and leave no loop.
            "no loop that multiplies is found, so its copies are not checked": not code.loop["instructions"]
            and case.config.split_k == 1,
            "no asynchronous copy in the loop": nvidia and not code.loop["async_copies"],
            f"{code.plain_copies} plain loads or stores in the loop": nvidia and code.plain_copies,
            "blocks of other allocations are read through one buffer": not nvidia
            and PROBLEMS[case.problem].num_blocks > 1
            and not code.plain_copies,
            # Each waits for the last, between the tensor cores' instructions. One that stands for itself is none:
            # sm_100 computes with no operand in constant memory.
            f"{code.loop['constant_loads']} loads of constants in the loop": warpgroups
            and code.loop["constant_loads"] > (case.arch == "sm_100"),
        }
        issue, tensor = cycles(case, code)
        # Not on sm_100, whose tensor cores are twice as fast: 128x256x64 takes 45 to 52% of their cycles, 128x128x64 80
        # to 97%. 128x128x128 would take 57 to 64%, but has no room for a second program: 10% more time by the model.
        if case.default and tensor and case.arch != "sm_100":
            wrong[f"{issue:.0f} cycles to issue a step of {tensor:.0f} on the tensor cores"] = issue > 0.65 * tensor
    return [sentence for sentence, holds in wrong.items() if holds]


def cycles(case: Case, code) -> tuple[float, float | None]:
    """Of one K step of a program that has a multiprocessor to itself: to issue it, and on the tensor cores.

    To issue: one instruction a cycle for each of four schedulers; where the tensor cores run beside the warps (sm_90,
    sm_100), at least the stalls that the compiler wrote into the instructions of one warp.
    """
    config = case.config
    stalls = code.stalls if case.arch in ("sm_90", "sm_100") else 0
    issue = max(code.loop["instructions"] * config.num_warps / 4, stalls)
    if case.dtype == "float32" and not case.tf32:
        return issue, None
    rate = ARCHITECTURES[case.arch].multiply_adds // (2 if case.tf32 else 1)
    return issue, config.rows * config.block_n * config.block_k / rate
