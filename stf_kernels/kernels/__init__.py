"""Triton device code and nothing else: every file here holds `@triton.jit` functions and their formula.

segmented_linear.py   the GEMM: read this first
split_k.py            how programs share its K axis
activations.py        what its epilogue applies
tma.py, swap_ab.py    the same GEMM with its tiles fetched by TMA, and with A and B swapped
"""
