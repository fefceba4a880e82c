"""The two operators of LLaVA-STF (arXiv 2506.07138) as functions.

concat_linear          y = act(concat(blocks, -1) @ W^T + b)     Multi-Block Token Fusion
spatial_merge_linear   y = act(merge_rxr(x) @ W^T + b)           Spatial Token Fusion
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .ops import operators
from .relayout import channel_to_patch_major


def concat_linear(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    skip_tokens: int = 0,
) -> Tensor:
    """Linear layer over the concatenation of M blocks, which is never built: act(concat(blocks, -1) @ W^T + b).

    Args:
        blocks: 1 to 32 tensors [B, T, C] of one shape, dtype (fp16, bf16, fp32; fp64 on the torch path) and device.
            Strided views such as `hidden_state[:, 1:]` are read in place.
        weight: [N, M*C], block-major: columns s*C to (s+1)*C belong to blocks[s].
        bias: [N] or None.
        activation: None, "gelu" (exact, erf), "gelu_tanh" or "silu".
        skip_tokens: leading tokens of every block that are not read (1 for a CLS token).

    Returns:
        [B, T - skip_tokens, N], contiguous, in the dtype of the blocks (under autocast, autocast's).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device, an unknown activation.

    Source: Multi-Block Token Fusion of arXiv 2506.07138, first layer.
    """
    checks.check_choice("activation", activation, checks.ACTIVATIONS)
    checks.check_blocks(blocks)
    blocks, (weight, bias) = under_autocast(blocks[0], blocks, (weight, bias))
    x = blocks[0]
    checks.check_skip(skip_tokens, x.shape[1])
    k = len(blocks) * x.shape[2]
    checks.check_linear(weight, bias, k, f"{len(blocks)} blocks of {x.shape[2]} channels", "blocks", x)
    biases = [] if bias is None else [bias]
    return operators.concat_linear(list(blocks), [weight], biases, activation, skip_tokens, 1, 0, 0)


def spatial_merge_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: tuple[int, int],
    merge_size: int = 2,
    activation: str | None = None,
    skip_tokens: int = 0,
    feature_order: str = "patch_major",
    truncate: bool = False,
) -> Tensor:
    """Linear layer over r x r neighbourhoods of a token grid, merged on load: act(merge_rxr(x) @ W^T + b).

    Args:
        x: [B, skip_tokens + H*W, C], tokens row-major over the grid; fp16, bf16, fp32, or fp64 on the torch path.
        weight: [N, r*r*C] in `feature_order`.
        bias, activation: as for concat_linear.
        grid: (H, W) of the tokens before merging.
        merge_size: r, from 1 to 16.
        skip_tokens: leading tokens that are not part of the grid (1 for a CLS token).
        feature_order: order of the weight's columns, c the channel, (dy, dx) the place in the window:
            "patch_major" (dy*r + dx)*C + c, or "channel_major" c*r*r + dy*r + dx (F.unfold, the official weights).
            "channel_major" copies the weight on every call; convert it once with `channel_to_patch_major` instead. A
            wrong order raises no error, only wrong outputs, so state it.
        truncate: drop the last rows and columns of a grid that r does not divide; without it that is an error.

    Returns:
        [B, (H//r)*(W//r), N], contiguous, in the dtype of x (under autocast, autocast's).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device, a grid that does not fit the tokens or
            the merge size, an unknown activation or order.

    Source: Spatial Token Fusion of arXiv 2506.07138, first layer.
    """
    checks.check_choice("activation", activation, checks.ACTIVATIONS)
    checks.check_choice("feature_order", feature_order, checks.FEATURE_ORDERS)
    checks.check_int("merge_size", merge_size, 1, 16)
    checks.check_tokens("x", x)
    if grid is None:
        raise TypeError("grid: expected (H, W), got None; the modules take None for a square")
    ((x, weight, bias),) = under_autocast(x, (x, weight, bias))
    checks.check_skip(skip_tokens, x.shape[1])
    height, width = checks.resolve_grid(grid, x.shape[1] - skip_tokens, merge_size, truncate)
    meaning = f"{merge_size}x{merge_size} windows of {x.shape[2]} channels"
    checks.check_linear(weight, bias, merge_size**2 * x.shape[2], meaning, "x", x)
    if feature_order == "channel_major":
        weight = channel_to_patch_major(weight, merge_size)
    biases = [] if bias is None else [bias]
    return operators.spatial_merge_linear([x], [weight], biases, activation, skip_tokens, merge_size, height, width)


def under_autocast(x: Tensor, *groups: Sequence) -> Sequence[Sequence]:
    """The groups of operands in the dtype that nn.Linear would compute in under autocast; float64 stays, as it does
    there, and so does what is no tensor, for the checks that follow to name."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return groups
    dtype = torch.get_autocast_dtype(device_type)
    return [[value.to(dtype) if isinstance(value, Tensor) else value for value in group] for group in groups]
