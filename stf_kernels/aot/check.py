"""What is asserted of a compiled case: the sentences of `violations`. One for memory that is not 16-byte aligned need
only fit."""

from dataclasses import asdict

from ..configs.model import ARCHITECTURES, SHARED_MEMORY_LIMIT
from .cases import PROBLEMS, Case, launch_of


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
            f"{code.spills} spilled": code.spills,
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
            # sm_100 computes with no operand in constant memory, and a weight gradient's loop, short of registers,
            # loads its bounds again.
            f"{code.loop['constant_loads']} loads of constants in the loop": warpgroups
            and code.loop["constant_loads"] > (case.arch == "sm_100")
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
    stalls = code.stalls if case.arch in ("sm_90", "sm_100") else 0
    issue = max(code.loop["instructions"] * config.num_warps / 4, stalls)
    if case.dtype == "float32" and not case.tf32:
        return issue, None
    rate = ARCHITECTURES[case.arch].multiply_adds // (2 if case.tf32 else 1)
    return issue, config.rows * config.block_n * config.block_k / rate
