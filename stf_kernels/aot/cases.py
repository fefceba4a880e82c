"""The specialisations that are compiled ahead of time, and the arguments of the launches that they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..configs import GemmConfig
from ..configs.model import has_tma, split_tiles, swap_ab_tiles, tiles, tma_tiles, wgrad_tiles
from ..configs.tables import DTYPES, shipped_configs
from ..ops import launch
from ..tune.candidates import forms_for
from ..tune.problems import PROBLEMS, Problem

_TRITON_TYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_FEW_TILES = ("linear_merge", "linear_scatter")  # where the tuner splits K first


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
        kind = "tf32" if self.tf32 else _TRITON_TYPE[self.dtype]
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
        shipped = shipped_configs(arch, dtype, wgrad=problem.wgrad)
        forms = forms_for(problem, arch, itemsize)
        if problem.wgrad:
            configs = [*wgrad_tiles(arch, itemsize), *shipped]
        elif problem.save_pre:
            configs = []
        else:
            configs = [form for config in shipped for form in (config, config.portable()) if form.form in forms]
            configs += split_tiles(arch, itemsize) if name in _FEW_TILES else []
            configs += tma_tiles(arch, itemsize) if "tma" in forms else []
            configs += swap_ab_tiles(arch, itemsize) if "swap_ab" in forms else []
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


def kernel_of(case: Case):
    """The kernel that a case launches."""
    from ..kernels.segmented_linear import _segmented_linear_fwd_kernel
    from ..kernels.swap_ab import _linear_swap_ab_fwd_kernel
    from ..kernels.tma import _segmented_linear_tma_fwd_kernel
    from ..kernels.wgrad import _segmented_wgrad_kernel

    if PROBLEMS[case.problem].wgrad:
        return _segmented_wgrad_kernel
    return {
        "pointer": _segmented_linear_fwd_kernel,
        "tma": _segmented_linear_tma_fwd_kernel,
        "swap_ab": _linear_swap_ab_fwd_kernel,
    }[case.config.form]


def kernel_arguments(case: Case) -> dict[str, object]:
    """Every argument that a kernel of `kernel_of` may have, as the launch that `case` stands for passes it."""
    from .codegen import Descriptor, Pointer

    p, config = PROBLEMS[case.problem], case.config
    kind = _TRITON_TYPE[case.dtype]
    pointer = Pointer(kind, case.aligned)
    # An odd pitch is what keeps rows from being aligned, whatever the base address.
    pitch = p.c if case.aligned else p.c + 1
    dense = p.num_blocks == 1 or case.one_image
    box_rows = config.block_m if dense and config.block_m != 192 else 64
    pitches = p.num_blocks if p.wgrad else 1
    split = config.split_k > 1
    dtype = getattr(torch, case.dtype)
    return {
        "block_ptrs": (pointer,) * p.num_blocks,
        "base_ptr": pointer,
        "w_ptr": pointer,
        "bias_ptr": pointer,
        "y_ptr": pointer,
        "pre_ptr": pointer if p.save_pre else None,
        "rows_ptr": Pointer("i64") if p.index_rows else None,
        "workspace_ptr": Pointer("fp32") if split else None,
        "arrived_ptr": Pointer("i32") if split else None,
        "x_desc": Descriptor(kind, (1, 1, box_rows, config.block_k)),
        "w_desc": Descriptor(kind, (config.block_n, config.block_k)),
        "main_desc": Descriptor(kind, (config.block_m, config.block_k)),
        "tail_desc": Descriptor(kind, (config.tail_m, config.block_k)),
        "M": 8 * p.tokens,
        "N": p.n,
        "tokens": p.tokens,
        "grid_h": p.stage.grid[0],
        "grid_w": p.stage.grid[1],
        "y_stride": p.stage.merge_out**2 * p.n,
        "y_rows": 0,
        "x_strides_b": ((p.source_tokens + 1) * pitch,) * pitches,
        "x_strides_t": (pitch,) * pitches,
        "w_stride_n": p.k if case.aligned else p.k + 1,
        "image_rows": p.tokens,
        # of a weight gradient
        "images": 8,
        "g_ptr": pointer,
        "dw_ptr": pointer,
        "g_stride": p.n,
        "dw_stride": p.k,
        "GRID_W": p.stage.grid[1] if p.stage.merge_in > 1 else 0,
        "WHOLE_STEPS": p.tokens % config.block_k == 0,
        **launch.epilogue_constants(
            p.stage, dtype, config, has_bias=True, save_pre=p.save_pre, index_rows=p.index_rows
        ),
        "FAST_ACTIVATION": (1 if case.arch.startswith("gfx") else 2) if dtype.itemsize == 2 else 0,
        "INPUT_PRECISION": "tf32" if case.tf32 else "ieee",
        "NUM_BLOCKS": p.num_blocks,
        "C": p.c,
        "ALIGNMENT": 16 // dtype.itemsize if case.aligned else 1,
        "MERGE_IN": p.stage.merge_in,
        "UNIFORM_STRIDES": True,
        "SPLIT_K": config.split_k,
        "UNIT": 512,
        "BOX_M": box_rows,
        "TAIL_M": config.tail_m,
    }
