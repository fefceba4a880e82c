"""One file per operator, on a shared core. From an operator down to its kernel:

concat_linear.py, spatial_merge_linear.py, token_fusion.py   the operators
registration.py  torch.library: schema, fake, autograd, autocast, and the eager bypass
chain.py         stages in a row, and the rule of what is kept for the backward
backward.py      the gradients of a chain; weight_grad.py the one over operands that are not materialised
stage.py         what one segmented GEMM computes: geometry, shapes, where its rows come from and go
torch_path.py    a stage in plain torch; composite.py a whole chain, for torch.func
launch.py        a stage in Triton: takes a configuration, never searches
forms.py         which kernel a configuration names, and its arguments
descriptors.py   when operands can be named to TMA; workspace.py what split-K needs beside its operands
direct_launch.py how a kernel is started: by the JIT, or past its argument binding; pdl.py whether it may start early
compile_ahead.py many kernels compiled at once, before they are measured
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
