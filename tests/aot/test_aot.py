"""If these fail, code that ships does not fit, spills or is not pipelined on some GPU, or the check cannot see it.

The compiler runs in processes of its own: a kernel imported under TRITON_INTERPRET cannot be compiled.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from stf_kernels import aot
from stf_kernels.codegen import TARGETS, Code, Pointer, compile_for, innermost_math_loop
from stf_kernels.kernels.activation_bwd import _activation_bwd_kernel
from stf_kernels.kernels.segmented_linear import _segmented_linear_fwd_kernel
from stf_kernels.ops import launch
from stf_kernels.ops.forms import stage_constants
from stf_kernels.ops.segments import Stage
from stf_kernels.configs import GemmConfig

from .trap_kernel import gemm_with_remainder


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stf_kernels.aot", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_every_default_configuration_compiles_for_every_gpu():
    done = run_aot("--defaults")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("0 with violations")
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert sum(line.startswith(arch) for line in lines) >= 15, arch


def test_interpreted_kernels_are_refused():
    done = run_aot("--defaults", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_without_triton_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(aot, "has_triton", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--defaults"])
    assert stopped.value.code == 2
    assert "pip install triton" in capsys.readouterr().err


def test_unknown_target_is_refused():
    done = run_aot("--target", "sm_75")
    assert done.returncode == 2
    assert "sm_75" in done.stderr


@pytest.mark.parametrize("trap", [True, False])
def test_the_remainder_trap_goes_red(trap):
    """A bare `k % C` compiles and computes the right thing, with plain loads and stores instead of async copies."""
    pointer = Pointer("bf16")
    code = compile_for(
        "sm_90",
        gemm_with_remainder,
        {
            "x_ptr": pointer, "w_ptr": pointer, "y_ptr": pointer, "K": 8192, "x_stride": 1024, "w_stride": 8192,
            "y_stride": 4096, "C": 1024, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "TRAP": trap,
        },
        num_warps=8,
        num_stages=3,
    )  # fmt: skip
    found = aot.violations(aot.Case("sm_90", "concat", "bfloat16", GemmConfig(128, 128, 64)), code)
    assert any("plain loads" in line for line in found) == trap


def test_a_tile_that_is_too_large_goes_red():
    """Four stages of 128x256x64 fit sm_90 and do not fit sm_89, though the compiler is content with both."""
    config = GemmConfig(128, 256, 64, num_warps=8, num_stages=4)
    case = aot.Case("sm_89", "concat", "bfloat16", config)
    _, found = aot.examine(case)
    assert any("shared memory" in line and "101376" in line for line in found)
    assert not aot.examine(replace(case, arch="sm_90"))[1]


def test_spills_go_red():
    """A 256x256 tile of one warpgroup does not fit the register file."""
    _, found = aot.examine(aot.Case("sm_80", "concat", "bfloat16", GemmConfig(256, 256, 32, num_warps=4, num_stages=2)))
    assert any("spilled" in line for line in found)


def test_a_loop_that_the_check_does_not_find_goes_red():
    """A disassembler of other words would leave nothing to check, and nothing would be wrong."""
    case = aot.Case("sm_90", "concat", "bfloat16", GemmConfig(128, 128, 64))
    fine = Code(
        registers=99, spilled=0, shared=9999, tensor_core=4, loop_lines=50, loop_async_copies=8, loop_plain_copies=0
    )
    assert aot.violations(case, fine) == []
    [found] = aot.violations(case, replace(fine, loop_lines=0))
    assert "no loop" in found


def test_plain_fp32_has_no_tensor_core_and_tf32_has():
    config = GemmConfig(64, 64, 16)
    case = aot.Case("sm_90", "concat", "float32", config)
    line, found = aot.examine(case)
    assert not found
    assert "tensor-core   0" in line
    assert not aot.examine(replace(case, tf32=True))[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"N": 1}, {"tokens": 1}, {"M": 1}, {"grid_w": 1, "grid_h": 1}, {"x_strides_t": (1,), "x_strides_b": (1,)},
        {"y_stride": 1}, {"w_stride_n": 1}, {"w_stride_n": 2**33}, {"bias_ptr": None, "HAS_BIAS": False},
    ],
    ids=str,
)  # fmt: skip
def test_specialisations_of_degenerate_sizes_compile(changes):
    """The JIT turns an integer of 1 into a constant and a large one into int64: the kernel must take both."""
    case = aot.Case("sm_90", "linear_merge", "bfloat16", GemmConfig(16, 16, 16, num_stages=2))
    arguments = {**aot.kernel_arguments(case), **changes}
    compile_for("sm_90", _segmented_linear_fwd_kernel, arguments, num_warps=4, num_stages=2)


@pytest.mark.parametrize(
    ("stage", "num_blocks", "c", "uniform"),
    [
        (Stage("silu"), 3, 100, False),
        (Stage("gelu_tanh", merge_in=3, grid=(9, 9)), 1, 40, True),
        (Stage(), 32, 64, True),
    ],
)
def test_unusual_shapes_compile(stage, num_blocks, c, uniform):
    """Tails of C, strides of every block on their own, many blocks: what the interpreter takes, the compiler must."""
    config = GemmConfig(32, 32, 32)
    case = aot.Case("sm_80", "concat", "float16", config)
    constants = stage_constants(
        stage, num_blocks, c, torch.float16, config,
        uniform_strides=uniform, has_bias=True, save_pre=True, index_rows=False,
    )  # fmt: skip
    count = 1 if uniform else num_blocks
    pointer = Pointer("fp16")
    arguments = {
        **aot.kernel_arguments(case), **constants, "block_ptrs": (pointer,) * num_blocks, "pre_ptr": pointer,
        "x_strides_b": tuple(range(16000, 16000 + count)), "x_strides_t": tuple(range(100, 100 + count)),
    }  # fmt: skip
    code = compile_for("sm_80", _segmented_linear_fwd_kernel, arguments, num_warps=4, num_stages=3)
    assert code.tensor_core


def test_the_elementwise_backward_compiles_everywhere():
    for arch in TARGETS:
        for activation in ("gelu", "gelu_tanh", "silu"):
            pointer = Pointer("bf16")
            code = compile_for(
                arch, _activation_bwd_kernel,
                {
                    "dy_ptr": pointer, "pre_ptr": pointer, "dpre_ptr": pointer, "act_ptr": pointer,
                    "partial_ptr": Pointer("fp32"), "M": 1152, "N": 16384, "ACTIVATION": activation,
                    "FAST_ACTIVATION": True, "WRITE_ACT": True, "SUM_ROWS": True,
                    "ROWS_PER_PROGRAM": launch.ROWS_PER_PROGRAM, "BLOCK_M": launch.BLOCK_M, "BLOCK_N": launch.BLOCK_N,
                },
                num_warps=4, num_stages=3,
            )  # fmt: skip
            assert code.spilled == 0, (arch, activation)


def test_the_innermost_loop_is_the_shortest_that_multiplies():
    lines = [
        ".L_x_0:",
        "LDG",
        ".L_x_1:",
        "LDGSTS",
        "HMMA.16816",
        "BRA `(.L_x_1)",
        "BRA `(.L_x_0)",
        ".L_x_2:",
        "BRA `(.L_x_2)",
    ]
    loop = innermost_math_loop(lines, r"^\s*(\.L_x_\d+):", r"\bBRA\w*\b.*\(?(\.L_x_\d+)")
    assert loop == lines[2:6]
    assert innermost_math_loop(["HMMA.16816"], r"^(\.L_x_\d+):", r"BRA (\.L_x_\d+)") == []
