"""One file per operator, on a shared core:

stage.py         what one segmented GEMM computes: geometry, shapes, where its rows come from and go
launch.py        the Triton launcher: takes a configuration, never searches
compile_ahead.py many kernels compiled at once, before they are measured
direct_launch.py past the JIT's argument binding
workspace.py     what split-K needs beside its operands
torch_path.py    the same stage in plain torch
chain.py         stages in a row, and the rule of what is kept for the backward
backward.py      the gradients of a chain; weight_grad.py the one over operands that are not materialised
registration.py  torch.library: schema, fake, autograd, autocast, and the eager bypass
concat_linear.py, spatial_merge_linear.py, token_fusion.py   the operators
"""

from .concat_linear import concat_linear
from .spatial_merge_linear import spatial_merge_linear
from .stage import split_windows
from .token_fusion import compact_token_projector, compact_token_projector_out, token_fusion_mlp

__all__ = [
    "compact_token_projector",
    "compact_token_projector_out",
    "concat_linear",
    "spatial_merge_linear",
    "split_windows",
    "token_fusion_mlp",
]
