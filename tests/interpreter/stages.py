"""One stage on the kernels beside the same stage in torch: operands, and the numerical rule on both results."""

import torch
from support.rule import assert_within_rule
from torch import Tensor

from reference.functional import activate, spatial_merge
from stf_kernels.configs import GemmConfig
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage


def tower(
    count: int, batch: int, tokens: int, c: int, dtype: torch.dtype = torch.float32, *, skip: int = 1, gap: int = 0
) -> list[Tensor]:
    """Blocks as a tower gives them: slices of one allocation, `skip` leading tokens cut off by a view.

    What is skipped is NaN and must not enter a sum; gap: elements between two blocks.
    """
    size = batch * (tokens + skip) * c
    memory = torch.randn(count * (size + gap)).to(dtype)
    views = [memory[i * (size + gap) :][:size].view(batch, tokens + skip, c) for i in range(count)]
    for view in views:
        view[:, :skip] = float("nan")
    return [view[:, skip:] for view in views]


def matrix(blocks: list[Tensor], stage: Stage) -> Tensor:
    """A, materialised: [B, rows of an image, K]."""
    if stage.merge_in > 1:
        return spatial_merge(blocks[0], stage.grid, stage.merge_in, "patch_major", True)
    return torch.cat(blocks, -1)


def compare(config: GemmConfig | None, stage: Stage, blocks: list[Tensor], n: int) -> Tensor:
    """Run the stage with a weight and bias of its own, in the blocks' dtype -> y, both results held to the rule."""
    dtype, k = blocks[0].dtype, stage.num_segments(blocks) * blocks[0].shape[-1]
    weight, bias = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)
    y, pre = run_stage(blocks, weight, bias, stage, config, save_pre=True)

    def run(to: torch.dtype) -> tuple[Tensor, Tensor]:
        flat = matrix([block.to(to) for block in blocks], stage) @ weight.to(to).t() + bias.to(to)
        placed = activate(flat, stage.activation)
        if stage.merge_out > 1:
            placed = spatial_merge(placed, stage.grid, stage.merge_out, "patch_major", True)
        return flat.flatten(0, 1), placed

    (same_pre, same), (exact_pre, exact) = run(dtype), run(torch.float64)
    assert_within_rule(f"pre-activation of {config}", pre, same_pre, exact_pre)
    assert_within_rule(f"output of {config}", y, same, exact)
    return y
