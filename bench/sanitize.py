"""One small projector, forward and backward, on the GPU: the case that compute-sanitizer watches.

Odd sizes: every tail mask of the kernels is used, and an access past the end of an operand is an access out of bounds.
"""

import torch

import stf_kernels
from bench.problems import Sizes, build_projector, random_blocks
from stf_kernels.ops.launch import launch_stage
from stf_kernels.ops.stage import Stage
from stf_kernels.ops.weight_grad import launch_segmented_wgrad
from stf_kernels.tuning import GemmConfig

ODD = Sizes(dim=40, out_dim=72, blocks=3, grid=6)


def main() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        projector = build_projector(ODD, stf_kernels.CompactTokenProjector, device="cuda", dtype=dtype, seed=1)
        blocks = random_blocks(ODD, 2, device="cuda", dtype=dtype, seed=2)
        with stf_kernels.use_backend("triton"):
            projector(blocks).float().square().mean().backward()
        weight_gradient(dtype)
        if torch.cuda.get_device_capability() >= (9, 0) and dtype != torch.float32:
            hopper_forms(dtype)
    torch.cuda.synchronize()


def weight_gradient(dtype: torch.dtype) -> None:
    """Rows of an image, features and channels that end inside a tile."""
    blocks = [torch.randn(2, 38, 40, device="cuda").to(dtype)[:, 1:] for _ in range(3)]
    g = torch.randn(2 * 37, 72, device="cuda").to(dtype)
    launch_segmented_wgrad(g, blocks, Stage(), GemmConfig(64, 64, 32))


def hopper_forms(dtype: torch.dtype) -> None:
    """Tiles by descriptor and the swapped form with K split: rows, features and columns that end inside a tile."""
    x, weight = torch.randn(1, 100, 192, device="cuda").to(dtype), torch.randn(72, 192, device="cuda").to(dtype)
    for config in (
        GemmConfig(64, 64, 64, form="descriptors"),
        GemmConfig(64, 64, 64, form="swapped", tail_m=16, split_k=2),
    ):
        launch_stage([x], weight, None, Stage("gelu"), config)


if __name__ == "__main__":
    main()
