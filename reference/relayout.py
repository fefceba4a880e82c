"""The two orders of the merged feature axis, c = channel, (dy, dx) = offset inside the window.

patch-major    (dy*r + dx)*C + c
channel-major  c*r*r + dy*r + dx     F.unfold, pixel_unshuffle
"""

from einops import rearrange
from torch import Tensor


def channel_to_patch_major(weight: Tensor, merge_size: int) -> Tensor:
    """[N, C*r*r] -> [N, r*r*C]"""
    return rearrange(weight, "n (c dy dx) -> n (dy dx c)", dy=merge_size, dx=merge_size)


def patch_to_channel_major(weight: Tensor, merge_size: int) -> Tensor:
    """[N, r*r*C] -> [N, C*r*r]"""
    return rearrange(weight, "n (dy dx c) -> n (c dy dx)", dy=merge_size, dx=merge_size)
