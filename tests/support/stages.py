"""One stage on the kernels beside the same in torch: operands, and the rule on the results."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.functional import activate, spatial_merge
from stf_kernels.configs import GemmConfig
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

from .rule import assert_within_rule


def tower(
    count: int, batch: int, tokens: int, c: int, dtype=torch.float32, *, skip: int = 1, gap: int = 0, device="cpu"
) -> list[Tensor]:
    """Blocks as a tower gives them: slices of one allocation, `skip` leading tokens cut off by a view.

    What is skipped is NaN and must not enter a sum; gap: elements between two blocks.
    """
    size = batch * (tokens + skip) * c
    memory = torch.randn(count * (size + gap), device=device).to(dtype)
    views = [memory[i * (size + gap) :][:size].view(batch, tokens + skip, c) for i in range(count)]
    for view in views:
        view[:, :skip] = float("nan")
    return [view[:, skip:] for view in views]


def matrix(blocks: list[Tensor], stage: Stage) -> Tensor:
    """A, materialised: [B, rows of an image, K]."""
    if stage.merge_in > 1:
        return spatial_merge(blocks[0], stage.grid, stage.merge_in, "patch_major", True)
    return torch.cat(blocks, -1)


def by_layers(blocks, weight, bias, stage: Stage, activation: str | None) -> tuple[Tensor, Tensor]:
    """(pre-activation [M, N], y) in the formula's own steps."""
    flat = F.linear(matrix(blocks, stage), weight, bias)
    y = activate(flat, activation)
    if stage.merge_out > 1:
        y = spatial_merge(y, stage.grid, stage.merge_out, "patch_major", True)
    return flat.flatten(0, 1), y


def compare(config: GemmConfig | None, stage: Stage, blocks: list[Tensor], n: int, *, save_pre: bool = True) -> Tensor:
    """Run the stage with a weight and bias of its own, in the blocks' dtype -> y, the results held to the rule."""
    x, k = blocks[0], stage.num_segments(blocks) * blocks[0].shape[-1]
    weight, bias = (torch.randn(shape, device=x.device) for shape in ((n, k), (n,)))
    weight, bias = (weight / k**0.5).to(x.dtype), bias.to(x.dtype)
    y, pre = run_stage(blocks, weight, bias, stage, config, save_pre=save_pre)

    def run(to: torch.dtype) -> tuple[Tensor, Tensor]:
        return by_layers([block.to(to) for block in blocks], weight.to(to), bias.to(to), stage, stage.activation)

    (same_pre, same), (exact_pre, exact) = run(x.dtype), run(torch.float64)
    assert_within_rule(f"pre-activation of {config}", pre, *((same_pre, exact_pre) if save_pre else (None, None)))
    assert_within_rule(f"output of {config}", y, same, exact)
    return y


def compare_indexed(config: GemmConfig, blocks: list[Tensor], n: int) -> None:
    """Into rows of `out`, three of them outside it: a GPU's rows are not looked at before, so the kernel guards."""
    x, m = blocks[0], blocks[0].shape[0] * blocks[0].shape[1]
    weight = torch.randn(n, len(blocks) * x.shape[2], device=x.device).to(x.dtype)
    memory = torch.full((m + 30, n), 7.0, dtype=x.dtype, device=x.device)
    out, rows = memory[10:-10], torch.randperm(m + 10, device=x.device)[:m]
    rows[3], rows[4], rows[5] = m + 10, -1, 2**40
    expected, _ = run_stage(blocks, weight, None, Stage("gelu"), config)
    y, _ = run_stage(blocks, weight, None, Stage("gelu"), config, out=out, rows=rows)
    assert y is out
    inside = [i for i in range(m) if i not in (3, 4, 5)]
    torch.testing.assert_close(out[rows[inside]], expected.flatten(0, 1)[inside])
    out[rows[inside]] = 7.0
    assert bool((memory == 7).all())
