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

from .tuning import SHARED_MEMORY_LIMIT

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
    loop_lines: int  # of the innermost loop that multiplies; 0: none was found
    loop_async_copies: int  # in the innermost loop that multiplies
    loop_plain_copies: int  # plain global loads and shared stores there


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
        return _read_nvidia(arch, usage, _tool("nvdisasm", "-c", str(cubin)), shared)


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
    loop = innermost_math_loop(sass.splitlines(), r"^\s*(\.L_x_\d+):", r"\bBRA\w*\b.*\(?(\.L_x_\d+)")
    # A loop of few known steps is unrolled and gone; its copies are then counted in the whole kernel.
    copies = sum(bool(_ASYNC_COPY.search(line)) for line in loop or sass.splitlines())
    plain = sum(bool(re.search(r"\b(?:LDG|STS)\b", line)) for line in loop)
    return Code(
        registers=found["REG"],
        spilled=found["STACK"],
        shared=shared,
        tensor_core=len(re.findall(rf"\b{TENSOR_CORE[arch]}\b", sass)),
        loop_lines=len(loop),
        loop_async_copies=copies,
        loop_plain_copies=plain,
    )


def _read_amd(assembly: str, shared: int) -> Code:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    loop = innermost_math_loop(assembly.splitlines(), r"^(\.LBB\w+):", r"\bs_c?branch\w*\s+(\.LBB\w+)")
    return Code(
        registers=field("vgpr_count"),
        spilled=field("vgpr_spill_count") + field("sgpr_spill_count"),
        shared=shared,
        tensor_core=len(re.findall(r"\bv_mfma", assembly)),
        loop_lines=len(loop),
        loop_async_copies=0,
        loop_plain_copies=sum("global_load" in line or "ds_write" in line for line in loop),
    )


def innermost_math_loop(lines: list[str], label: str, branch: str) -> list[str]:
    """The shortest loop (a branch back to an earlier label) that multiplies; [] if there is none."""
    position, loops = {}, []
    for i, line in enumerate(lines):
        if found := re.search(label, line):
            position[found[1]] = i
        elif (found := re.search(branch, line)) and found[1] in position:
            loops.append(lines[position[found[1]] : i + 1])
    multiplying = [loop for loop in loops if any(_MATH.search(line) for line in loop)]
    return min(multiplying, key=len, default=[])
