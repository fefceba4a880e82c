"""Compile every shipped kernel configuration for GPUs that are not here: `python -m stf_kernels.aot`."""
