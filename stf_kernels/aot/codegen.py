"""Compile a kernel for a GPU that is not here and read the machine code.

The compiler needs no driver. What the JIT would learn from the arguments of a launch (types, integers divisible by
16, 16-byte aligned pointers) is taken from an argument list like a launch's own, so the code is the code that runs.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..configs import SHARED_MEMORY_LIMIT

TARGETS = {
    arch: GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    for arch in SHARED_MEMORY_LIMIT
}

# The matrix-product instruction of each architecture's tensor cores.
TENSOR_CORE = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
_ASYNC_COPY = re.compile(r"\b(?:LDGSTS|UTMALDG)\b")  # of a thread's 16 bytes; of a box, by descriptor
_SASS_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_SASS_BRANCH = re.compile(r"\bBRA\w*\b.*\(?(\.L_x_\d+)")
_SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\S")
_SASS_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_MATH = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|FFMA2?|v_mfma\w*|v_(?:pk_)?fmac?_f32|v_dot\w*)\b")


@dataclass(frozen=True)
class Pointer:
    """A tensor argument: element type ("bf16", "fp32", "i64", ...) and whether its address is a multiple of 16."""

    dtype: str
    aligned: bool = True


@dataclass(frozen=True)
class Descriptor:
    """A host tensor descriptor: element type and the box that one load fetches."""

    dtype: str
    box: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """What the compiler made of one kernel."""

    registers: int
    spilled: int  # bytes of stack per thread (NVIDIA), registers spilled (AMD)
    shared: int  # bytes per program
    tensor_core: int  # matrix instructions of the architecture, in the whole kernel
    loop_instructions: int  # of the innermost loop that multiplies; 0: none was found
    loop_stalls: int  # cycles that its instructions keep a warp from issuing the next one, of a warp alone
    loop_tensor_core: int  # there
    loop_async_copies: int
    loop_plain_copies: int  # plain global loads and shared stores
    loop_constant_loads: int
    epilogue_instructions: int  # behind that loop


def compile_for(arch: str, kernel, arguments: Mapping[str, object], **options: object) -> Code:
    """Compile `kernel` (a triton.jit function) for an architecture of TARGETS.

    arguments: every parameter by name. Pointer for a tensor, Descriptor for a descriptor of one, None for an absent
    one, int for a run-time integer (specialised as a launch would), a tuple of those, and plain values for constexpr
    parameters. options: the launch's, num_warps and num_stages at least.
    """
    compiled = triton.compile(_source(kernel, arguments), target=TARGETS[arch], options=options)
    shared = compiled.metadata.shared
    if arch.startswith("gfx"):
        return _read_amd(compiled.asm["amdgcn"], shared)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        return _read_nvidia(arch, usage, _tool("nvdisasm", "-c", "-hex", str(cubin)), shared)


def _source(kernel, arguments: Mapping[str, object]) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        specialise = not parameter.do_not_specialize
        if isinstance(value, tuple):
            signature[parameter.name] = tuple(
                _describe(item, (index, i), specialise, constants, attributes) for i, item in enumerate(value)
            )
        else:
            signature[parameter.name] = _describe(value, (index,), specialise, constants, attributes)
    return ASTSource(kernel, signature, constants, attributes)


def _describe(value: object, path: tuple[int, ...], specialise: bool, constants: dict, attributes: dict) -> str:
    """The type of one argument; divisibility and constants go where the JIT would put them."""
    if value is None or (value == 1 and specialise):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Descriptor):
        return f"tensordesc<{value.dtype}{list(value.box)}>"
    if isinstance(value, Pointer):
        if value.aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + value.dtype
    if specialise and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if abs(value) < 2**31 else "i64"


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def _read_nvidia(arch: str, usage: str, sass: str, shared: int) -> Code:
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # An instruction is 128 bits, its second half on a line of its own; they are read as one line.
    joined = re.sub(r"\n\s*(?=/\* 0x[0-9a-f]{16} \*/)", " ", sass).splitlines()
    lines = [line for line in joined if _SASS_LABEL.search(line) or _SASS_INSTRUCTION.search(line)]
    loop, behind = innermost_math_loop(lines, _SASS_LABEL, _SASS_BRANCH)
    # A loop of few known steps is unrolled and gone; its copies are then counted in the whole kernel.
    copies = _count(_ASYNC_COPY, loop or lines)
    return Code(
        registers=found["REG"],
        spilled=found["STACK"],
        shared=shared,
        tensor_core=_count(TENSOR_CORE[arch], lines),
        loop_instructions=_count(_SASS_INSTRUCTION, loop),
        loop_stalls=sum(
            (int(words[-1], 16) >> 41) & 15 for line in loop if len(words := _SASS_WORD.findall(line)) == 2
        ),
        loop_tensor_core=_count(TENSOR_CORE[arch], loop),
        loop_async_copies=copies,
        loop_plain_copies=_count(r"\b(?:LDG|STS)\b", loop),
        loop_constant_loads=_count(r"\bU?LDC\b", loop),
        epilogue_instructions=_count(_SASS_INSTRUCTION, behind),
    )


def _read_amd(assembly: str, shared: int) -> Code:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    lines = assembly.splitlines()
    loop, behind = innermost_math_loop(lines, re.compile(r"^(\.LBB\w+):"), re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)"))
    instruction = r"^\s+[vs]_|^\s+(?:ds|global|buffer|flat)_"
    return Code(
        registers=field("vgpr_count"),
        spilled=field("vgpr_spill_count") + field("sgpr_spill_count"),
        shared=shared,
        tensor_core=_count(r"\bv_mfma", lines),
        loop_instructions=_count(instruction, loop),
        loop_stalls=0,
        loop_tensor_core=_count(r"\bv_mfma", loop),
        loop_async_copies=0,
        loop_plain_copies=_count(r"global_load|ds_write", loop),
        loop_constant_loads=_count(r"\bs_load", loop),
        epilogue_instructions=_count(instruction, behind),
    )


def _count(pattern: str | re.Pattern, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def innermost_math_loop(lines: list[str], label: re.Pattern, branch: re.Pattern) -> tuple[list[str], list[str]]:
    """The shortest loop (a branch back to an earlier label) that multiplies, and what stands behind it; [], [] if
    there is none."""
    position, loops = {}, []
    for i, line in enumerate(lines):
        if found := label.search(line):
            position[found[1]] = i
        elif (found := branch.search(line)) and found[1] in position:
            loops.append((position[found[1]], i + 1))
    multiplying = [(a, b) for a, b in loops if _count(_MATH, lines[a:b])]
    if not multiplying:
        return [], []
    begin, end = min(multiplying, key=lambda loop: loop[1] - loop[0])
    return lines[begin:end], lines[end:]
