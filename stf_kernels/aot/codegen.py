"""Compile a kernel for a GPU that is not here and read the machine code.

The compiler needs no driver. What the JIT learns from a launch's arguments (types, integers divisible by 16, aligned
addresses) its own binder learns here from arguments without memory, so the code is the code that runs.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ..configs.model import ARCHITECTURES


@dataclass(frozen=True)
class Words:
    """Patterns of an assembly language; the first group of label and branch is the label's name."""

    label: str
    branch: str
    instruction: str
    async_copy: str
    plain_copy: str  # global loads and shared stores; AMD: loads by whole addresses, not within one buffer
    constant_load: str
    stack: str  # what was spilled, on its way there or back


SASS = Words(
    label=r"^\s*(\.L_x_\d+):",
    branch=r"\bBRA\w*\b.*\(?(\.L_x_\d+)",
    instruction=r"/\*[0-9a-f]{4,}\*/\s+\S",
    async_copy=r"\b(?:LDGSTS|UTMALDG)\b",  # of a thread's 16 bytes; of a box, by descriptor
    plain_copy=r"\b(?:LDG|STS)\b",
    constant_load=r"\bU?LDC\b",
    stack=r"\b(?:LDL|STL)\b",
)
GCN = Words(
    label=r"^(\.LBB\w+):",
    branch=r"\bs_c?branch\w*\s+(\.LBB\w+)",
    instruction=r"^\s+(?:[vs]|ds|global|buffer|flat)_",
    async_copy=r"\b(?:global|buffer)_load_lds",
    plain_copy=r"\bglobal_load",
    constant_load=r"\bs_load",
    stack=r"\bscratch_",
)
_MATH = r"\b(?:HMMA|HGMMA|UTC\w*MMA|FFMA2?|v_mfma\w*|v_(?:pk_)?fmac?_f32|v_dot\w*)\b"
_SASS_WORD = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Code:
    """What the compiler made of one kernel."""

    registers: int
    spills: int  # bytes of stack per thread (NVIDIA), registers spilled (AMD)
    stack_accesses: int  # in the loop
    shared: int  # bytes per program
    tensor_core: int  # matrix instructions of the architecture, in the whole kernel
    loop: dict[str, int]  # of the innermost one that multiplies, "instructions" (0: none was found), "mma", ...
    plain_copies: int  # in the loop
    stalls: int  # cycles that its instructions keep a warp from issuing the next one, of a warp alone (NVIDIA)
    epilogue_instructions: int  # behind the loop


def compile_for(arch: str, kernel, arguments: Mapping[str, object], **options: int | bool) -> Code:
    """Compile `kernel` (a triton.jit function) for an architecture of ARCHITECTURES.

    arguments: every parameter by name, as of a launch; tensors may be on the meta device, where the address is the
    offset in the storage. options: the launch's, num_warps and num_stages at least.
    """
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    bound, special, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, special, {})
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options)
    shared, tensor_core = compiled.metadata.shared, ARCHITECTURES[arch].tensor_core
    if amd:
        text = compiled.asm["amdgcn"]
        found = {name: int(count) for name, count in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
        spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        return read(GCN, tensor_core, text.splitlines(), found["vgpr_count"], spills, shared)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, text = _tool("cuobjdump", "-res-usage", cubin), _tool("nvdisasm", "-ndf", "-c", "-hex", cubin)
    found = {name: int(count) for name, count in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # An instruction is 128 bits, its second half on a line of its own; they are read as one line.
    lines = re.sub(r"\n\s*(?=/\* 0x[0-9a-f]{16} \*/)", " ", text).splitlines()
    return read(SASS, tensor_core, lines, found["REG"], found["STACK"], shared)


def _tool(name: str, *arguments: str | Path) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read(words: Words, tensor_core: str, lines: list[str], registers: int, spills: int, shared: int) -> Code:
    """Count what the lines of a kernel hold, in its innermost loop that multiplies and behind it."""
    loop, behind = innermost_math_loop(lines, words)
    return Code(
        registers,
        spills,
        stack_accesses=_count(words.stack, loop),
        shared=shared,
        tensor_core=_count(tensor_core, lines),
        loop={
            "instructions": _count(words.instruction, loop),
            "mma": _count(tensor_core, loop),
            # A loop of few known steps is unrolled and gone; its copies are then counted in the whole kernel.
            "async_copies": _count(words.async_copy, loop or lines),
            "constant_loads": _count(words.constant_load, loop),
        },
        plain_copies=_count(words.plain_copy, loop),
        stalls=sum((int(w[-1], 16) >> 41) & 15 for line in loop if len(w := _SASS_WORD.findall(line)) == 2),
        epilogue_instructions=_count(words.instruction, behind),
    )


def _count(pattern: str, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def innermost_math_loop(lines: list[str], words: Words) -> tuple[list[str], list[str]]:
    """The shortest loop (a branch back to an earlier label) that multiplies, and what stands behind it; [], [] if
    there is none."""
    position, loops = {}, []
    for i, line in enumerate(lines):
        if found := re.search(words.label, line):
            position[found[1]] = i
        elif (found := re.search(words.branch, line)) and found[1] in position:
            loops.append((position[found[1]], i + 1))
    multiplying = [(a, b) for a, b in loops if _count(_MATH, lines[a:b])]
    begin, end = min(multiplying, key=lambda loop: loop[1] - loop[0], default=(len(lines), len(lines)))
    return lines[begin:end], lines[end:]
