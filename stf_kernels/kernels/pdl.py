"""Programmatic dependent launch: the next kernel of a stream is set up while this one still runs.

A kernel that was launched so (`launch_pdl`) may start before the one ahead of it has ended. It reads and writes
nothing before `wait_for_previous`, which returns when all of that kernel's stores are visible; so nothing is
reordered, and only the launch and the program's first instructions overlap. NVIDIA from sm_90 on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Stand before the first access to memory."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Let the next kernel's programs take the multiprocessors that have no program of this one left to start."""
    if PDL:
        gdc_launch_dependents()
