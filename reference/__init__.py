"""The executable specification: slow, obvious, torch + einops, any floating dtype.

`stf_kernels` never imports this package, and this package never imports `stf_kernels`:
the tests compare two programs that share no code.
"""

from .functional import concat_linear, spatial_merge_linear
from .modules import CompactTokenProjector, MultiBlockTokenFusion, SpatialTokenFusion
from .relayout import channel_to_patch_major, patch_to_channel_major

__all__ = [
    "CompactTokenProjector",
    "MultiBlockTokenFusion",
    "SpatialTokenFusion",
    "channel_to_patch_major",
    "concat_linear",
    "patch_to_channel_major",
    "spatial_merge_linear",
]
