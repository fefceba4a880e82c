"""The offline search, for who has a GPU: `python -m stf_kernels.tune` measures it and writes its table."""
