"""`python -m bench.kernels`: every product of the projector and the chain, ours against its rivals, on a GPU."""
