"""One small projector, forward and backward, on the GPU: the case that compute-sanitizer watches.

Odd sizes: every tail mask of the kernels is used, and an access past the end of an operand is an access out of bounds.
"""

import torch

import stf_kernels
from bench.problems import Sizes, build_projector, random_blocks

ODD = Sizes(dim=40, out_dim=72, blocks=3, grid=6)


def main() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        projector = build_projector(ODD, stf_kernels.CompactTokenProjector, device="cuda", dtype=dtype, seed=1)
        blocks = random_blocks(ODD, 2, device="cuda", dtype=dtype, seed=2)
        with stf_kernels.use_backend("triton"):
            projector(blocks).float().square().mean().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
