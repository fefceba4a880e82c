"""The modules of LLaVA-STF (arXiv 2506.07138), drop-in nn.Modules over the fused chains.

    MultiBlockTokenFusion    linear_2(act(linear_1(concat(blocks))))
    SpatialTokenFusion       linear_2(act(linear_1(merge_rxr(x))))
    CompactTokenProjector    stf(mbtf(blocks)): four GEMMs, no concatenation, no unfold

linear_1.weight of a SpatialTokenFusion is patch-major (channel_to_patch_major converts one). A layer that is not a
plain nn.Linear any more is called as the module it is (linear.py); the layers beside it stay fused.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .functional import concat_linear, spatial_merge_linear, under_autocast
from .linear import call_linear, is_untouched, parameters_of, parameters_of_all
from .ops import operators
from .ops.segments import merge_windows
from .ops.torch_path import activate


class _TwoLayers(nn.Module):
    """linear_1, an activation, linear_2: what both fusions are made of."""

    def __init__(self, in_dim, hidden_dim, out_dim, activation, bias, device, dtype):
        super().__init__()
        checks.check_choice("activation", activation, checks.ACTIVATIONS)
        checks.check_int("hidden_dim", hidden_dim, 1)
        checks.check_int("out_dim", out_dim, 1)
        checks.check_bool("bias", bias)
        checks.check_parameter_dtype(dtype)
        self.activation = activation
        self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias, device=device, dtype=dtype)

    def layers(self) -> tuple[nn.Module, nn.Module]:
        return self._modules["linear_1"], self._modules["linear_2"]

    def one_by_one(self, fused: Callable[..., Tensor], operand: Callable[[], Tensor]) -> Tensor:
        """Each layer read or called: linear_1 by fused(weight, bias, activation=...), or called on operand()."""
        first, second = map(parameters_of, self.layers())
        if first is not None:
            hidden = fused(*first, activation=self.activation)
        else:
            hidden = activate(call_linear("linear_1", self.linear_1, operand()), self.activation)
        return call_linear("linear_2", self.linear_2, hidden) if second is None else concat_linear([hidden], *second)


class MultiBlockTokenFusion(_TwoLayers):
    """Fuse M encoder blocks token by token: linear_2(act(linear_1(concat(blocks)))).

    Args:
        num_blocks: M, from 1 to 32.
        dim: C, channels of a block.
        hidden_dim: width of the hidden layer, 4*dim by default.  out_dim: dim by default.
        activation: None, "gelu" (exact), "gelu_tanh" or "silu".
        bias: both layers have one.
        skip_tokens: leading tokens of every block that are not read (1 for a CLS token).

    Shape: M tensors [B, T, dim] -> [B, T - skip_tokens, out_dim].  Source: MBTF of arXiv 2506.07138.
    """

    def __init__(
        self,
        num_blocks: int,
        dim: int,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        *,
        activation: str | None = "gelu",
        bias: bool = True,
        skip_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_int("num_blocks", num_blocks, 1, checks.MAX_BLOCKS)
        checks.check_int("dim", dim, 1)
        checks.check_int("skip_tokens", skip_tokens, 0)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        out_dim = dim if out_dim is None else out_dim
        super().__init__(num_blocks * dim, hidden_dim, out_dim, activation, bias, device, dtype)
        self.num_blocks, self.dim, self.skip_tokens = num_blocks, dim, skip_tokens

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        checks.check_module_blocks(blocks, self.num_blocks, self.dim, self.skip_tokens)
        found = parameters_of_all(self.layers())
        if found is not None:
            operands = chain_operands(blocks, *found)
            return operators.token_fusion_mlp(*operands, self.activation, self.skip_tokens, 1, 0, 0)
        fused = functools.partial(concat_linear, blocks, skip_tokens=self.skip_tokens)
        return self.one_by_one(fused, lambda: torch.cat([block[:, self.skip_tokens :] for block in blocks], dim=-1))

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, activation={self.activation!r}, skip_tokens={self.skip_tokens}"


class SpatialTokenFusion(_TwoLayers):
    """Fuse every r x r neighbourhood of tokens into one: linear_2(act(linear_1(merge_rxr(x)))).

    Args:
        dim: C, channels of a token.
        out_dim: width of the output.
        merge_size: r, from 1 to 16.
        hidden_dim: 4*r*r*dim by default.  activation, bias: as for MultiBlockTokenFusion.
        truncate: drop the last rows and columns of a grid that r does not divide; without it that is an error.

    Shape: [B, H*W, dim] -> [B, (H//r)*(W//r), out_dim].  Source: STF of arXiv 2506.07138.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        merge_size: int = 2,
        hidden_dim: int | None = None,
        activation: str | None = "gelu",
        bias: bool = True,
        truncate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_int("dim", dim, 1)
        checks.check_int("merge_size", merge_size, 1, 16)
        checks.check_bool("truncate", truncate)
        window = merge_size**2
        hidden_dim = 4 * window * dim if hidden_dim is None else hidden_dim
        super().__init__(window * dim, hidden_dim, out_dim, activation, bias, device, dtype)
        self.dim, self.merge_size, self.truncate = dim, merge_size, truncate

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x [B, H*W, dim]; grid (H, W), or None for a square."""
        checks.check_tokens("x", x, self.dim)
        grid = checks.resolve_grid(grid, x.shape[1], self.merge_size, self.truncate)
        found = parameters_of_all(self.layers())
        if found is not None:
            operands = chain_operands([x], *found, self.merge_size)
            return operators.token_fusion_mlp(*operands, self.activation, 0, self.merge_size, *grid)
        r, truncate = self.merge_size, self.truncate
        fused = functools.partial(spatial_merge_linear, x, grid=grid, merge_size=r, truncate=truncate)
        return self.one_by_one(fused, lambda: merge_windows(x, grid, self.merge_size))

    def extra_repr(self) -> str:
        return f"merge_size={self.merge_size}, activation={self.activation!r}, truncate={self.truncate}"


class CompactTokenProjector(nn.Module):
    """The projector of LLaVA-STF: M encoder blocks in, one token per r x r neighbourhood out.

        u = act(concat(blocks) @ W1^T + b1);  v = u @ W2^T + b2          child `mbtf`
        z = act(merge_rxr(v) @ W3^T + b3) @ W4^T + b4                    child `stf`

    Four GEMMs and no copy: the second writes its rows in the merged layout, the third reads them as a dense matrix.

    Args:
        num_blocks: M, from 1 to 32.
        dim: C, channels of a block.
        out_dim: width of the output, the language model's.
        merge_size: r; 1 is MBTF with a per-token projector.
        mbtf: False, with num_blocks=1, leaves MBTF out: STF alone.
        mbtf_hidden_dim, stf_hidden_dim, skip_tokens, activation, bias, truncate: the children's.

    Shape: M tensors [B, skip_tokens + H*W, dim] -> [B, (H//r)*(W//r), out_dim].  Source: arXiv 2506.07138.
    """

    def __init__(
        self,
        num_blocks: int,
        dim: int,
        out_dim: int,
        *,
        merge_size: int = 2,
        skip_tokens: int = 0,
        mbtf: bool = True,
        mbtf_hidden_dim: int | None = None,
        stf_hidden_dim: int | None = None,
        activation: str | None = "gelu",
        bias: bool = True,
        truncate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_int("num_blocks", num_blocks, 1, checks.MAX_BLOCKS)
        checks.check_int("skip_tokens", skip_tokens, 0)
        checks.check_bool("mbtf", mbtf)
        if not mbtf and num_blocks != 1:
            raise ValueError(f"num_blocks: expected 1 with mbtf=False, got {num_blocks}")
        for name, width in (("mbtf_hidden_dim", mbtf_hidden_dim), ("stf_hidden_dim", stf_hidden_dim)):
            if width is not None:  # the children know it as hidden_dim
                checks.check_int(name, width, 1)
        self.num_blocks, self.dim, self.out_dim, self.skip_tokens = num_blocks, dim, out_dim, skip_tokens
        shared: dict[str, Any] = {"activation": activation, "bias": bias, "device": device, "dtype": dtype}
        self.mbtf = None
        if mbtf:
            self.mbtf = MultiBlockTokenFusion(num_blocks, dim, mbtf_hidden_dim, skip_tokens=skip_tokens, **shared)
        shared |= {"merge_size": merge_size, "hidden_dim": stf_hidden_dim, "truncate": truncate}
        self.stf = SpatialTokenFusion(dim, out_dim, **shared)

    def forward(
        self,
        blocks: Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        *,
        out: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Project M blocks [B, skip_tokens + H*W, dim]; grid (H, W), or None for a square.

        With out [R, out_dim] and rows [B*(H//r)*(W//r)] int64, token i of the flattened result is written to
        out[rows[i]] by the last GEMM itself and `out` is returned: how image tokens land in the language model's
        inputs_embeds without another pass. Inference only. Rows must be distinct and within `out`. On a
        GPU their values are not checked: a kernel leaves one outside out, plain torch stops with CUDA's assertion.
        """
        checks.check_module_blocks(blocks, self.num_blocks, self.dim, self.skip_tokens)
        stf = self._modules["stf"]  # an attribute look-up of a child takes most of a microsecond
        r = stf.merge_size
        grid = checks.resolve_grid(grid, blocks[0].shape[1] - self.skip_tokens, r, stf.truncate)
        if out is not None or rows is not None:
            count = blocks[0].shape[0] * (grid[0] // r) * (grid[1] // r)
            checks.check_out(out, rows, count, self.out_dim, blocks[0])
            if torch.is_grad_enabled() and any(t.requires_grad for t in (out, *blocks, *self.parameters())):
                raise ValueError(
                    "out: writing into `out` is for inference and keeps no gradient; call it under torch.no_grad(), or "
                    "without out and rows"
                )
        found = parameters_to_read(self._modules.get("mbtf"), stf, MultiBlockTokenFusion, SpatialTokenFusion)
        if found is not None:
            operands = chain_operands(blocks, *found, r)
            static = stf.activation, self.skip_tokens, r, *grid
            if out is None:
                return operators.compact_token_projector(*operands, *static)
            operators.compact_token_projector_out(*operands, *static, out, rows)
            return out
        x = blocks[0][:, self.skip_tokens :] if self.mbtf is None else self.mbtf(blocks)
        z = stf(x, grid)
        return z if out is None else out.index_copy_(0, rows, z.flatten(0, 1).to(out.dtype))

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, skip_tokens={self.skip_tokens}"


def parameters_to_read(
    mbtf: nn.Module | None, stf: nn.Module, mbtf_class: type[nn.Module], stf_class: type[nn.Module]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """(weights, biases) of a projector's four layers if both children, of exactly these classes, can be read instead of
    called."""
    if mbtf is None or not (is_untouched(mbtf, mbtf_class) and is_untouched(stf, stf_class)):
        return None
    if mbtf.activation != stf.activation:
        return None
    return parameters_of_all(child._modules[name] for child in (mbtf, stf) for name in ("linear_1", "linear_2"))


_LAYERS = {2: ("linear_1.", "linear_2."), 4: ("mbtf.linear_1.", "mbtf.linear_2.", "stf.linear_1.", "stf.linear_2.")}


def chain_operands(
    blocks: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], merge_size: int = 1
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The operands of a chain of two or four layers in the dtype that autocast asks for, each layer checked against
    the one before it: parameters can be replaced after construction, and a kernel takes its sizes from them."""
    blocks, weights, biases = under_autocast(blocks[0], blocks, weights, biases)
    merges = len(weights) - 2  # the layer that reads windows
    width = len(blocks) * blocks[0].shape[2]
    for i, (weight, layer) in enumerate(zip(weights, _LAYERS[len(weights)], strict=True)):
        width *= merge_size**2 if i == merges else 1
        bias = biases[i] if biases else None
        checks.check_linear(weight, bias, width, "the width of its input", "blocks", blocks[0], layer)
        width = weight.shape[0]
    return list(blocks), list(weights), list(biases)
