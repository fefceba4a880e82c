"""What is asserted of a compiled case:

    shared memory within the architecture's limit
    nothing spilled
    tensor-core instructions for 16-bit and tf32 operands (IEEE fp32 has none on NVIDIA)
    on NVIDIA, asynchronous copies and no plain load or store in the loop that multiplies
    on AMD, blocks that are read by their own addresses
    on sm_90 and sm_100, no loads of constants there: each waits for the last, between the tensor cores' instructions
    of a default, at most 65% of the tensor cores' cycles of a step to issue it (not on sm_100, whose tensor cores are
    twice as fast; there a search has forms that issue less)

The specialisation for memory that is not 16-byte aligned need only fit.
"""

from dataclasses import asdict

from ..configs.model import ARCHITECTURES, SHARED_MEMORY_LIMIT
from ..tune.problems import PROBLEMS
from .cases import Case, launch_of


def examine(case: Case) -> tuple[str, list[str], dict | None]:
    """Compile one case -> (its line of the report, its violations, its record for --json)."""
    from .codegen import compile_for

    try:
        kernel, arguments = launch_of(case)
        code = compile_for(case.arch, kernel, arguments, **case.config.compiler_options())
    except Exception as error:  # the compiler raises what it likes; a case that does not compile is a violation
        return f"{case}  does not compile", [f"does not compile: {error!s:.300}"], None
    spilled = f"{code.spilled:3}" + (" (allowed: unaligned)" if code.spilled and not case.aligned else "")
    line = (
        f"{case}  registers {code.registers:3}  spilled {spilled}  shared {code.shared:6}  "
        f"tensor-core {code.tensor_core:3}  loop: async {code.loop_async_copies:2}, plain {code.loop_plain_copies:3}"
    )
    return line, violations(case, code), record(case, code)


def violations(case: Case, code) -> list[str]:
    """What is wrong with the compiled code, one sentence each; [] if nothing is."""
    nvidia, warpgroups = case.arch.startswith("sm_"), case.arch in ("sm_90", "sm_100")
    limit = SHARED_MEMORY_LIMIT[case.arch]
    wrong = {f"shared memory {code.shared} bytes, the limit of {case.arch} is {limit}": code.shared > limit}
    if case.aligned:
        ieee = nvidia and case.dtype == "float32" and not case.tf32
        wrong |= {
            f"{code.spilled} spilled": code.spilled,
            "no tensor-core instruction": not code.tensor_core and not ieee,
            # Only the few steps of a share of K may be unrolled and leave no loop.
            "no loop that multiplies is found, so its copies are not checked": not code.loop_instructions
            and case.config.split_k == 1,
            "no asynchronous copy in the loop": nvidia and not code.loop_async_copies,
            f"{code.loop_plain_copies} plain loads or stores in the loop": nvidia and code.loop_plain_copies,
            "blocks of other allocations are read through one buffer": not nvidia
            and PROBLEMS[case.problem].num_blocks > 1
            and not code.loop_plain_copies,
            # One that stands for itself is none: sm_100 computes with no operand in constant memory, and a weight
            # gradient's loop, short of registers, loads its bounds again.
            f"{code.loop_constant_loads} loads of constants in the loop": warpgroups
            and code.loop_constant_loads > (case.arch == "sm_100")
            and not PROBLEMS[case.problem].wgrad,
        }
        issue, tensor = cycles(case, code)
        if case.default and tensor and case.arch != "sm_100":
            wrong[f"{issue:.0f} cycles to issue a step of {tensor:.0f} on the tensor cores"] = issue > 0.65 * tensor
    return [sentence for sentence, holds in wrong.items() if holds]


def cycles(case: Case, code) -> tuple[float, float | None]:
    """Of one K step of a program that has a multiprocessor to itself: to issue it, and on the tensor cores.

    To issue: one instruction a cycle for each of four schedulers; where the tensor cores run beside the warps (sm_90,
    sm_100), at least the stalls that the compiler wrote into the instructions of one warp.
    """
    config = case.config
    stalls = code.loop_stalls if case.arch in ("sm_90", "sm_100") else 0
    issue = max(code.loop_instructions * config.num_warps / 4, stalls)
    if case.dtype == "float32" and not case.tf32:
        return issue, None
    rate = ARCHITECTURES[case.arch].multiply_adds // (2 if case.tf32 else 1)
    return issue, config.rows * config.block_n * config.block_k / rate


def record(case: Case, code) -> dict:
    """A case as --json writes it."""
    issue, tensor = cycles(case, code)
    return asdict(case) | {
        "config": str(case.config),
        "registers": code.registers,
        "spills": code.spilled,
        "shared": code.shared,
        "loop": {
            "instructions": code.loop_instructions,
            "issue_cycles": issue,
            "tensor_cycles": tensor,
            "constant_loads": code.loop_constant_loads,
            "mma": code.loop_tensor_core,
            "async_copies": code.loop_async_copies,
        },
        "epilogue_instructions": code.epilogue_instructions,
    }
