"""python -m stf_kernels.aot: compile every shipped kernel configuration for GPUs that are not here, and check the code.

Asserted of each:

    shared memory within the architecture's limit
    nothing spilled
    tensor-core instructions for 16-bit and tf32 operands (IEEE fp32 has none on NVIDIA)
    on NVIDIA, asynchronous copies and no plain load or store in the loop that multiplies

The last three are asserted of the specialisation that a launch on 16-byte aligned memory takes; the unaligned one
need only fit. gfx942 has no asynchronous copy.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from .backend import has_triton
from .ops.forms import stage_constants
from .ops.weight_grad import wgrad_constants
from .problems import PROBLEMS
from .tuning import SHARED_MEMORY_LIMIT, GemmConfig
from .tuning.candidates import forms_for
from .tuning.heuristic import descriptor_tiles, has_descriptor_forms, split_tiles, swapped_tiles, tiles, wgrad_tiles
from .tuning.lookup import DTYPES, shipped_configs

_TRITON_TYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


_FEW_TILES = ("linear_merge", "linear_scatter")  # where the tuner splits K first
_ONE_OPERAND = ("linear_merge", "linear", "linear_scatter")
_DEFAULT_PROBLEMS = ("concat", "linear_merge", "merge", "linear_scatter")


@dataclass(frozen=True)
class Case:
    """One specialisation of a segmented GEMM on one architecture."""

    arch: str
    problem: str
    dtype: str  # torch's name
    config: GemmConfig
    aligned: bool = True
    tf32: bool = False
    pdl: bool = False
    one_image: bool = False  # its rows have one pitch, so a descriptor's box is the whole tile

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else _TRITON_TYPE[self.dtype]
        more = {" unaligned": not self.aligned, " pdl": self.pdl, " one image": self.one_image}
        words = "".join(word for word, holds in more.items() if holds)
        return f"{self.arch:7} {self.problem:14} {kind:4} {self.config!s:23}{words}"


def cases(arch: str, *, defaults_only: bool) -> Iterator[Case]:
    """Every shipped specialisation of an architecture, or only the defaults in bf16 and fp32."""
    if defaults_only:
        for config in tiles(arch, 2):
            yield from (Case(arch, name, "bfloat16", config) for name in _DEFAULT_PROBLEMS)
        yield from (Case(arch, "concat_train", "bfloat16", config) for config in tiles(arch, 2, save_pre=True))
        yield from (Case(arch, "concat", "float32", config) for config in tiles(arch, 4))
        yield Case(arch, "concat", "bfloat16", tiles(arch, 2)[-1], aligned=False)
        yield from (Case(arch, "linear_merge", "bfloat16", config) for config in split_tiles(arch, 2)[-1:])
        yield from (Case(arch, "concat", "bfloat16", config, pdl=True) for config in descriptor_tiles(arch, 2)[:2])
        yield from (Case(arch, "linear", "bfloat16", config, pdl=True) for config in swapped_tiles(arch, 2)[:1])
        yield from (Case(arch, "concat_wgrad", "bfloat16", config) for config in wgrad_tiles(arch, 2))
        return
    for dtype, itemsize in DTYPES.items():
        for name, problem in PROBLEMS.items():
            if problem.wgrad:
                yield from _wgrad_cases(arch, name, dtype)
                continue
            configs = [*tiles(arch, itemsize, save_pre=problem.save_pre)]
            if not problem.save_pre:
                shipped = [
                    config
                    for config in shipped_configs(arch, dtype, wgrad=False)
                    if config.form in forms_for(problem, arch, itemsize)
                ]
                configs += [form for config in shipped for form in (config, config.portable())]
            if name in _FEW_TILES:
                configs += split_tiles(arch, itemsize)
            if problem.stage.gather == 1 and not problem.save_pre:
                configs += descriptor_tiles(arch, itemsize)
            if name in _ONE_OPERAND:
                configs += swapped_tiles(arch, itemsize)
            for config in dict.fromkeys(configs):
                yield Case(arch, name, dtype, config)
                if config.form == "descriptors" and problem.num_blocks > 1:
                    yield Case(arch, name, dtype, config, one_image=True)
                if has_descriptor_forms(arch, itemsize):  # where dependent launches are, too
                    yield Case(arch, name, dtype, config, pdl=True)
                if dtype == "float32":
                    yield Case(arch, name, dtype, config, tf32=True)
        yield from (Case(arch, "concat", dtype, config, aligned=False) for config in tiles(arch, itemsize))


def _wgrad_cases(arch: str, name: str, dtype: str) -> Iterator[Case]:
    for config in dict.fromkeys([*wgrad_tiles(arch, DTYPES[dtype]), *shipped_configs(arch, dtype, wgrad=True)]):
        yield Case(arch, name, dtype, config)
        yield Case(arch, name, dtype, config, aligned=False)
        if dtype == "float32":
            yield Case(arch, name, dtype, config, tf32=True)


def kernel_arguments(case: Case) -> dict[str, object]:
    """The arguments of the launch that `case` stands for, in the form of `codegen.compile_for`."""
    from .codegen import Descriptor, Pointer

    p, config = PROBLEMS[case.problem], case.config
    kind = _TRITON_TYPE[case.dtype]
    pointer = Pointer(kind, case.aligned)
    # An odd pitch is what keeps rows from being aligned, whatever the base address.
    pitch = p.c if case.aligned else p.c + 1
    dense = p.num_blocks == 1 or case.one_image
    box_rows = config.block_m if dense and config.block_m != 192 else 64
    if p.wgrad:
        constants = wgrad_constants(p.stage, p.num_blocks, p.c, p.tokens, config)
    else:
        constants = stage_constants(
            p.stage, p.num_blocks, p.c, getattr(torch, case.dtype), config, has_bias=True, save_pre=p.save_pre,
            scatter_rows=p.scatter_rows, unit=512, box_rows=box_rows,
        )  # fmt: skip
    pitches = p.num_blocks if p.wgrad else 1
    constants |= {"INPUT_PRECISION": "tf32" if case.tf32 else "ieee", "PDL": case.pdl}
    return {
        "block_ptrs": (pointer,) * p.num_blocks,
        "w_ptr": pointer,
        "bias_ptr": pointer,
        "y_ptr": pointer,
        "pre_ptr": pointer if p.save_pre else None,
        "rows_ptr": Pointer("i64") if p.scatter_rows else None,
        "M": 8 * p.tokens,
        "N": p.n,
        "tokens": p.tokens,
        "grid_w": p.stage.grid[1],
        "grid_h": p.stage.grid[0],
        "x_strides_b": ((p.source_tokens + 1) * pitch,) * pitches,
        "x_strides_t": (pitch,) * pitches,
        "w_stride_n": p.k if case.aligned else p.k + 1,
        "y_stride": p.stage.scatter**2 * p.n,
        "y_rows": 0,
        # where K is split
        "workspace_ptr": Pointer("fp32") if config.split_k > 1 else None,
        "arrived_ptr": Pointer("i32") if config.split_k > 1 else None,
        # where tiles come by descriptor
        "x_desc": Descriptor(kind, (1, 1, box_rows, config.block_k)),
        "w_desc": Descriptor(kind, (config.block_n, config.block_k)),
        "base_ptr": pointer,
        "image_rows": p.tokens,
        "main_desc": Descriptor(kind, (config.block_m, config.block_k)),
        "tail_desc": Descriptor(kind, (config.tail_m, config.block_k)),
        # of a weight gradient
        "images": 8,
        "g_ptr": pointer,
        "dw_ptr": pointer,
        "g_stride": p.n,
        "dw_stride": p.k,
        **constants,
    }


def kernel_of(case: Case):
    """The kernel that a case launches on operands that suit its configuration."""
    from .kernels.descriptor import _segmented_linear_descriptor_fwd_kernel
    from .kernels.segmented_linear import _segmented_linear_fwd_kernel
    from .kernels.segmented_wgrad import _segmented_wgrad_kernel
    from .kernels.split_k import _segmented_linear_split_k_fwd_kernel
    from .kernels.swapped import _swapped_linear_fwd_kernel

    config = case.config
    if PROBLEMS[case.problem].wgrad:
        return _segmented_wgrad_kernel
    if config.form == "pointers":
        return _segmented_linear_fwd_kernel if config.split_k == 1 else _segmented_linear_split_k_fwd_kernel
    return _segmented_linear_descriptor_fwd_kernel if config.form == "descriptors" else _swapped_linear_fwd_kernel


def examine(case: Case) -> tuple[str, list[str]]:
    """Compile one case -> (its line of the report, its violations)."""
    from .codegen import compile_for

    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    if case.pdl:
        options["launch_pdl"] = True
    try:
        code = compile_for(case.arch, kernel_of(case), kernel_arguments(case), **options)
    except Exception as error:  # the compiler raises what it likes; a case that does not compile is a violation
        return f"{case}  does not compile", [f"does not compile: {error!s:.300}"]
    line = (
        f"{case}  registers {code.registers:3}  spilled {code.spilled:3}  shared {code.shared:6}  "
        f"tensor-core {code.tensor_core:3}  loop: async {code.loop_async_copies:2}, plain {code.loop_plain_copies:3}"
    )
    return line, violations(case, code)


def violations(case: Case, code) -> list[str]:
    """What is wrong with the compiled code, one sentence each; [] if nothing is."""
    nvidia = case.arch.startswith("sm_")
    found = []
    limit = SHARED_MEMORY_LIMIT[case.arch]
    if code.shared > limit:
        found.append(f"shared memory {code.shared} bytes, the limit of {case.arch} is {limit}")
    if not case.aligned:
        return found
    if code.spilled:
        found.append(f"{code.spilled} spilled")
    if code.tensor_core == 0 and not (nvidia and case.dtype == "float32" and not case.tf32):
        found.append("no tensor-core instruction")
    # Only the few steps of a share of K may be unrolled and leave no loop.
    if code.loop_lines == 0 and case.config.split_k == 1:
        found.append("no loop that multiplies is found, so its copies are not checked")
    if nvidia and code.loop_async_copies == 0:
        found.append("no asynchronous copy in the loop")
    if nvidia and code.loop_plain_copies:
        found.append(f"{code.loop_plain_copies} plain loads or stores in the loop")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stf_kernels.aot", description=__doc__.splitlines()[0])
    archs = list(SHARED_MEMORY_LIMIT)
    parser.add_argument("--target", nargs="+", choices=archs, default=archs, metavar="ARCH", help=f"of {archs}")
    parser.add_argument("--defaults", action="store_true", help="only the default configurations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    if not has_triton():
        parser.error("triton is not installed, which compiles the kernels: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    todo = [case for arch in options.target for case in cases(arch, defaults_only=options.defaults)]
    broken = 0
    with ProcessPoolExecutor(max(1, options.jobs), mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(examine, case) for case in todo]):
            line, found = future.result()
            print(line, *(f"\n    VIOLATION: {violation}" for violation in found), flush=True)
            broken += bool(found)
    print(f"{len(todo)} configurations compiled for {len(options.target)} architectures, {broken} with violations")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
