"""Fused Triton kernels for LLaVA-STF (arXiv 2506.07138): fewer vision tokens, one pass over memory.

Imports without a GPU, without Triton and without transformers. Importing it registers its operators with torch.
"""

from typing import TYPE_CHECKING

from .command import STARTED, lazy

if TYPE_CHECKING or not STARTED:
    from . import layers
    from .backend import use_backend
    from .functional import concat_linear, spatial_merge_linear
    from .modules import CompactTokenProjector, MultiBlockTokenFusion, SpatialTokenFusion
    from .preparation import prepare
    from .relayout import channel_to_patch_major, patch_to_channel_major

__version__ = "0.2.0.dev0"

__all__ = [
    "CompactTokenProjector",
    "MultiBlockTokenFusion",
    "SpatialTokenFusion",
    "channel_to_patch_major",
    "concat_linear",
    "layers",
    "patch_to_channel_major",
    "prepare",
    "spatial_merge_linear",
    "use_backend",
]

# layers first: the name of its class means the one of modules here
__getattr__ = lazy(__name__, "layers", "backend", "functional", "modules", "preparation", "relayout")
