"""The two orders of the merged feature axis, and the way from one to the other.

    patch-major    (dy*r + dx)*C + c     what this library computes with: a window row is one run of memory
    channel-major  c*r*r + dy*r + dx     F.unfold, pixel_unshuffle, the official LLaVA-STF weights

The shapes agree, so a wrong order raises no error, only wrong outputs: convert a channel-major weight once, at load.
"""

from torch import Tensor


def _windows(weight: Tensor, merge_size: int) -> int:
    if not isinstance(merge_size, int) or isinstance(merge_size, bool) or merge_size < 1:
        raise ValueError(f"merge_size: expected a positive int, got {merge_size!r}")
    window = merge_size * merge_size
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor [N, r*r*C], got {type(weight).__name__}")
    if weight.ndim != 2 or weight.shape[1] % window:
        raise ValueError(
            f"weight: expected [N, r*r*C] with r*r = {window} (merge_size={merge_size}) dividing the second axis, "
            f"got {tuple(weight.shape)}"
        )
    return window


def channel_to_patch_major(weight: Tensor, merge_size: int) -> Tensor:
    """[N, C*r*r] -> [N, r*r*C], a contiguous copy; any dtype.  ValueError where r*r does not divide the columns."""
    window = _windows(weight, merge_size)
    n, k = weight.shape
    return weight.view(n, k // window, window).transpose(1, 2).reshape(n, k)


def patch_to_channel_major(weight: Tensor, merge_size: int) -> Tensor:
    """[N, r*r*C] -> [N, C*r*r], a contiguous copy; the inverse of `channel_to_patch_major`."""
    window = _windows(weight, merge_size)
    n, k = weight.shape
    return weight.view(n, window, k // window).transpose(1, 2).reshape(n, k)
