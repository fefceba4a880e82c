"""Triton device code and nothing else: every file here holds `@triton.jit` functions and their formula."""
