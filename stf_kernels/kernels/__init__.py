"""Triton device code and nothing else: every file here holds `@triton.jit` functions and their formula.

segmented_linear.py    the GEMM: read this first
activations.py         what its epilogue applies
split_k.py, descriptor.py, swapped.py   the same GEMM with K shared out, with tiles by TMA, with its operands swapped
segmented_wgrad.py     the weight gradient;  activation_bwd.py  the activation's
pdl.py                 two instructions of dependent launches

No tile size is written here: they are arguments, and come from `stf_kernels/tuning/`.
"""
