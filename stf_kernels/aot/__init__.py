"""Compile every shipped kernel configuration for GPUs that are not here: `python -m stf_kernels.aot`.

cases.py    what is compiled: architecture, problem, dtype, configuration
codegen.py  one kernel compiled, and what its machine code holds
check.py    what is asserted of it
"""
