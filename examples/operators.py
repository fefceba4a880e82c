"""The two operators against what they replace in plain PyTorch: same numbers, no concatenation, no unfolded copy.

Runs on a CPU in seconds: python examples/operators.py
"""

import torch
import torch.nn.functional as F

from stf_kernels import concat_linear, spatial_merge_linear

torch.manual_seed(0)
batch, side, channels, width = 2, 8, 64, 128
blocks = [torch.randn(batch, 1 + side * side, channels) for _ in range(4)]  # hidden states with a CLS token in front

# Concatenation of all blocks, then a linear layer, without its CLS token.
weight, bias = torch.randn(width, 4 * channels) * 0.05, torch.randn(width)
fused = concat_linear(blocks, weight, bias, activation="gelu", skip_tokens=1)
plain = F.gelu(F.linear(torch.cat([block[:, 1:] for block in blocks], dim=-1), weight, bias))
print(f"concat_linear         {tuple(fused.shape)}  largest difference {(fused - plain).abs().max():.1e}")
torch.testing.assert_close(fused, plain)

# Every 2x2 window of the token grid becomes one row, then a linear layer.
weight = torch.randn(width, 2 * 2 * width) * 0.05
merged = spatial_merge_linear(fused, weight, grid=(side, side), merge_size=2)
windows = fused.reshape(batch, side // 2, 2, side // 2, 2, width).transpose(2, 3).reshape(batch, -1, 4 * width)
plain = F.linear(windows, weight)
print(f"spatial_merge_linear  {tuple(merged.shape)}  largest difference {(merged - plain).abs().max():.1e}")
torch.testing.assert_close(merged, plain)
