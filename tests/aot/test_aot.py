"""If these fail, code that ships does not fit, spills or is not pipelined on some GPU, or the check cannot see it.

The command runs in a process of its own: a kernel imported under TRITON_INTERPRET cannot be compiled.
"""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from support.processes import python

from stf_kernels.aot import __main__ as command
from stf_kernels.aot import codegen
from stf_kernels.aot.cases import Case, cases, examine, launch_of, violations
from stf_kernels.aot.codegen import SASS, Code, compile_for, innermost_math_loop
from stf_kernels.configs import SHARED_MEMORY_LIMIT, GemmConfig
from stf_kernels.configs.model import tiles

CONFIG = GemmConfig(128, 128, 64, num_warps=8)
CONCAT = Case("sm_90", "concat", "bfloat16", CONFIG)


def test_every_default_configuration_compiles_for_every_gpu(tmp_path):
    done = python("-m", "stf_kernels.aot", "--defaults", "--json", str(tmp_path / "aot.json"), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("0 with violations")
    found = json.loads((tmp_path / "aot.json").read_text())
    assert found.keys() == {"triton", "cases"}
    loop = {"instructions", "issue_cycles", "tensor_cycles", "constant_loads", "mma", "async_copies"}
    fields = {"arch", "problem", "dtype", "default", "config", "registers", "spills", "shared", "loop"}
    for case in found["cases"]:
        assert case.keys() >= fields | {"epilogue_instructions"}
        assert case["loop"].keys() == loop
        assert case["default"]
    per_arch = Counter(case["arch"] for case in found["cases"])
    assert per_arch.keys() == SHARED_MEMORY_LIMIT.keys() == set(command.ARCHS)
    assert min(per_arch.values()) >= 15
    assert {case["dtype"] for case in found["cases"]} == {"bfloat16", "float32"}


# What is no default is not compiled above: one of each here, every one of them in the whole run.
NO_DEFAULTS = {
    "tma": lambda case: case.config.form == "tma",
    "tma, rows of one pitch": lambda case: case.one_image,
    "swap_ab": lambda case: case.config.form == "swap_ab" and case.config.split_k == 1,
    "swap_ab, K split": lambda case: case.config.form == "swap_ab" and case.config.split_k > 1,
    "pointer, K split": lambda case: case.config.form == "pointer" and case.config.split_k > 1,
    "tf32": lambda case: case.tf32,
}


@pytest.mark.parametrize("what", NO_DEFAULTS)
def test_every_form_of_kernel_compiles(what):
    found = [case for case in cases("sm_90", defaults_only=False) if NO_DEFAULTS[what](case)]
    line, wrong, _ = examine(found[0])
    assert not wrong, (line, wrong)


@pytest.mark.parametrize("form", ["pointer", "tma", "swap_ab"])
def test_a_dependent_launch_waits_before_it_reads(form, monkeypatch):
    """For all that the kernel ahead stores; and lets the next one start."""
    seen, read = [], codegen.read
    monkeypatch.setattr(
        codegen, "read", lambda words, core, lines, *of: seen.extend(lines) or read(words, core, lines, *of)
    )
    [case, *_] = [c for c in cases("sm_90", defaults_only=False) if c.config.pdl and c.config.form == form]
    line, wrong, _ = examine(case)
    assert not wrong, (line, wrong)
    memory = re.findall(r"\b(?:ACQBULK|PREEXIT|LDG|LDGSTS|STG|UTMALDG)\b", "\n".join(seen))
    assert memory[:2] == ["ACQBULK", "PREEXIT"]
    assert len(set(memory)) > 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm_75"], "sm_75"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["interpreted"], "TRITON_INTERPRET is set"),
        (["no triton"], "pip install triton"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, arguments, words):
    if arguments == ["interpreted"]:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if arguments == ["no triton"]:
        monkeypatch.setattr("stf_kernels.backend.has_triton", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments if arguments[0].startswith("--") else ["--defaults"])
    assert words in capsys.readouterr().err


@triton.jit
def gemm_with_traps(
    x_ptrs, w_ptr, y_ptr, K, x_stride, w_stride, y_stride,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRAP: tl.constexpr,
):  # fmt: skip
    """y = concat(x, -1) @ w^T over two blocks, with traps that the check of the machine code must see.

    mask       a bare `k & (C - 1)` hides the alignment of the loads, as `k % C` does before Triton 3.9
    pointer    a choice among pointers in the loop, where their distances would stay in registers
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        column = (k & (C - 1) if TRAP == "mask" else tl.multiple_of(k & (C - 1), BLOCK_K)) + lane
        base = x_ptrs[0]
        if TRAP == "pointer":
            for i in tl.static_range(1, 8):
                base = tl.where(k // C == i, x_ptrs[i], base)
        x = tl.load(base + m[:, None] * x_stride + column[None, :])
        w = tl.load(w_ptr + n[None, :] * w_stride + (k + lane)[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + m[:, None] * y_stride + n[None, :], acc.to(y_ptr.dtype.element_ty))


def trapped(trap: str) -> Code:
    pointer = torch.empty(16, dtype=torch.bfloat16, device="meta")
    return compile_for(
        "sm_90",
        gemm_with_traps,
        {
            "x_ptrs": (pointer,) * 8, "w_ptr": pointer, "y_ptr": pointer, "K": 8192, "x_stride": 1024, "w_stride": 8192,
            "y_stride": 4096, "C": 1024, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "TRAP": trap,
        },
        num_warps=8,
        num_stages=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trap", "found"), [("mask", "plain loads or stores in the loop"), ("pointer", "loads of constants")]
)
def test_a_kernel_with_a_trap_goes_red(trap, found):
    """Both compile and compute the right thing."""
    [wrong] = violations(CONCAT, trapped(trap))
    assert found in wrong


def test_whatever_is_wrong_with_the_code_goes_red():
    fine = trapped("none")

    def in_loop(**changes) -> Code:
        return replace(fine, loop=fine.loop | changes)

    assert violations(replace(CONCAT, default=True), fine) == []
    assert violations(CONCAT, replace(fine, stalls=340)) == [], "a search may try what issues slowly"
    assert violations(CONCAT, replace(fine, spills=8)) == [], "two words that the loop leaves alone"
    for changed, found in (
        (replace(fine, shared=300_000), "shared memory 300000 bytes.*232448"),
        (replace(fine, spills=12), "12 spilled"),
        (replace(fine, spills=8, stack_accesses=1), "8 spilled, 1 times"),
        (replace(fine, tensor_core=0), "no tensor-core"),
        (in_loop(instructions=0), "no loop"),  # a disassembler of other words would leave nothing to check
        (in_loop(async_copies=0), "no asynchronous copy"),
        (replace(fine, plain_copies=2), "2 plain loads"),
        (in_loop(constant_loads=3), "3 loads of constants"),
        (in_loop(instructions=170), "340 cycles to issue a step of 512"),
        (replace(fine, stalls=340), "340 cycles to issue a step of 512"),
    ):
        [wrong] = violations(replace(CONCAT, default=True), changed)
        assert re.search(found, wrong)
    assert violations(replace(CONCAT, arch="sm_80"), replace(in_loop(constant_loads=3), shared=9999)) == []
    amd, near = replace(CONCAT, arch="gfx942"), replace(fine, shared=9999)
    assert violations(amd, replace(near, plain_copies=2)) == []
    assert violations(amd, near) == ["blocks of other allocations are read through one buffer"]
    assert violations(replace(CONCAT, aligned=False), replace(fine, spills=8)) == [], "unaligned code need only fit"


@pytest.mark.parametrize(
    ("arch", "config", "wrong"),
    [
        ("sm_80", GemmConfig(128, 128, 32, num_warps=2, num_stages=2), "spilled"),  # more than the register file holds
        ("sm_89", GemmConfig(128, 256, 64, num_warps=8, num_stages=4), "shared memory.*101376"),
    ],
)
def test_spills_and_shared_memory_are_read_from_the_compiler(arch, config, wrong):
    _, [found], _ = examine(Case(arch, "linear_scatter", "bfloat16", config))
    assert re.search(wrong, found)


def test_plain_fp32_has_no_tensor_core():
    line, found, record = examine(replace(CONCAT, dtype="float32", config=tiles("sm_90", 4)[-1]))
    assert not found
    assert "tensor-core   0" in line
    assert record["loop"]["tensor_cycles"] is None


def test_what_does_not_compile_is_a_violation():
    line, [found], record = examine(replace(CONCAT, config=replace(CONFIG, num_warps=64)))
    assert "does not compile" in line
    assert found.startswith("does not compile: ")
    assert record is None


ONES = dict.fromkeys(("M", "N", "tokens", "grid_h", "grid_w", "y_stride", "w_stride_n"), 1)
HALF = torch.empty(16, dtype=torch.float16, device="meta")
UNUSUAL = {
    # The JIT turns an integer of 1 into a constant and a large one into int64: the kernel must take both.
    "sizes of one": ONES | {"x_strides_t": (1,), "x_strides_b": (1,)},
    "a far stride": {"w_stride_n": 2**33},
    "no bias": {"bias_ptr": None, "HAS_BIAS": False},
    # What the interpreter takes, the compiler must.
    "a tail of C, strides of each block": {
        "block_ptrs": (HALF,) * 3, "NUM_BLOCKS": 3, "C": 100, "ACTIVATION": "silu", "UNIFORM_STRIDES": False,
        "x_strides_b": (16000, 16001, 16002), "x_strides_t": (100, 101, 102),
    },
    "nine segments": {"block_ptrs": (HALF,), "NUM_BLOCKS": 1, "C": 40, "MERGE_IN": 3, "ACTIVATION": "gelu_tanh"},
    "many blocks": {"block_ptrs": (HALF,) * 32, "NUM_BLOCKS": 32, "C": 64},
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_specialisations_compile(what):
    kernel, arguments = launch_of(Case("sm_80", "concat_train", "float16", GemmConfig(32, 32, 32)))
    assert compile_for("sm_80", kernel, arguments | UNUSUAL[what], num_warps=4, num_stages=3).tensor_core


def test_the_innermost_loop_is_the_shortest_that_multiplies():
    inner = [".L_x_1:", "LDGSTS", "HMMA.16816", "BRA `(.L_x_1)"]
    behind = ["BRA `(.L_x_0)", ".L_x_2:", "BRA `(.L_x_2)"]
    longer = [".L_x_3:", "HMMA.16816", *["LDG"] * 5, "BRA `(.L_x_3)"]
    found = innermost_math_loop([*longer, ".L_x_0:", "LDG", *inner, *behind], SASS)
    assert found == (inner, behind)
    assert innermost_math_loop(["HMMA.16816"], SASS) == ([], [])
