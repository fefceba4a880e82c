"""From an operator down to its kernel, in the order of a call:

operators.py    the operators: which stages each of them is
autograd.py     torch.library: schema, fake, autograd; and the eager way past the dispatcher
chain.py        stages in a row, and the rule of what is kept for the backward
launch.py       a stage in Triton: which kernel, with which arguments; tma.py when operands can be named to TMA
torch_path.py   a stage in plain torch
segments.py     what a stage computes: geometry, shapes, where its rows come from and go
backward.py     the gradients of a chain, in plain torch
"""
