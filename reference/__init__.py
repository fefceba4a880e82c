"""The executable specification: slow, obvious, torch + einops, any floating dtype.

`stf_kernels` never imports this package, and this package never imports `stf_kernels`:
the tests compare two programs that share no code.
"""

from .functional import concat_linear, spatial_merge_linear
from .modules import CompactTokenProjector, MultiBlockTokenFusion, SpatialTokenFusion

__all__ = [
    "CompactTokenProjector",
    "MultiBlockTokenFusion",
    "SpatialTokenFusion",
    "concat_linear",
    "spatial_merge_linear",
]
