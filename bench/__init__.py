"""Honest measurements of stf_kernels: see METHOD.md for how, results/ for what came out."""
