"""Layers of the kernels hub: stateless, their forward takes the place of another layer's.

`kernelize` (of the package `kernels`) puts it on an instance of any class that has kernel_layer_name =
"CompactTokenProjector", skip_tokens, and children mbtf and stf with the attributes of those in modules.py.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from . import checks
from .modules import chain_operands, parameters_to_read
from .ops import operators


class CompactTokenProjector(nn.Module):
    """stf(mbtf(blocks)) in one chain: M blocks [B, skip_tokens + H*W, C] -> [B, (H//r)*(W//r), out_dim].

    The layer's own forward runs where MBTF is left out, where `out` is given and where a child is not to be read: it
    has hooks, or a linear that is not a plain nn.Linear (LoRA, quantised, sharded).
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        blocks: Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        *,
        out: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        mbtf, stf, skip = self.mbtf, self.stf, self.skip_tokens
        found = parameters_to_read(mbtf, stf, type(mbtf), type(stf)) if out is None else None
        if found is None:
            return type(self).forward(self, blocks, grid, out=out, rows=rows)
        dim, r = mbtf.linear_2.out_features, stf.merge_size
        checks.check_module_blocks(blocks, mbtf.linear_1.in_features // dim, dim, skip)
        grid = checks.resolve_grid(grid, blocks[0].shape[1] - skip, r, stf.truncate)
        operands = chain_operands(blocks, *found, r)
        return operators.compact_token_projector(*operands, stf.activation, skip, r, *grid)
