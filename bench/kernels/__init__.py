"""`python -m bench.kernels`: every product of the projector and the chain, this library against its rivals, on a GPU.

__main__   options, order, agreement       problems   sizes, random operands, float64 and gradients
providers  own paths and rivals            coldtime   how one call is timed       table   what is printed
"""
