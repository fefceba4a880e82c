"""The modules of LLaVA-STF (arXiv 2506.07138), drop-in nn.Modules over the fused chains.

    MultiBlockTokenFusion    linear_2(act(linear_1(concat(blocks))))
    SpatialTokenFusion       linear_2(act(linear_1(merge_rxr(x))))
    CompactTokenProjector    stf(mbtf(blocks)): four GEMMs, no concatenation, no unfold

Parameters are ordinary nn.Linear ones. A layer that is no longer a plain nn.Linear is called as the module it is
(plain_linear.py says when); the layers beside it stay fused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks, ops
from .autocast import cast_operands
from .functional import concat_linear, spatial_merge_linear
from .ops.torch_path import activate
from .plain_linear import FrozenRelayout, call_linear, is_untouched, plain_layers, plain_parameters
from .relayout import channel_to_patch_major


class _TwoLayers(nn.Module):
    """linear_1, an activation, linear_2: what both fusions are made of."""

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, activation: str | None, bias: bool,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ):  # fmt: skip
        super().__init__()
        checks.check_choice("activation", activation, checks.ACTIVATIONS)
        checks.check_int("hidden_dim", hidden_dim, 1)
        checks.check_int("out_dim", out_dim, 1)
        checks.check_bool("bias", bias)
        checks.check_parameter_dtype(dtype)
        self.activation = activation
        self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias, device=device, dtype=dtype)

    def readable(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """(weights, biases) of the two layers if both can be read instead of called; see plain_layers."""
        return plain_layers((self._modules["linear_1"], self._modules["linear_2"]))

    def _linear_2(self, hidden: Tensor) -> Tensor:
        plain = plain_parameters(self.linear_2)
        return call_linear("linear_2", self.linear_2, hidden) if plain is None else concat_linear([hidden], *plain)


class MultiBlockTokenFusion(_TwoLayers):
    """Fuse M encoder blocks token by token: linear_2(act(linear_1(concat(blocks)))).

    Args:
        num_blocks: M, from 1 to 32.
        dim: C, channels of a block.
        hidden_dim: width of the hidden layer, 4*dim by default.
        out_dim: width of the output, dim by default.
        activation: None, "gelu" (exact), "gelu_tanh" or "silu".
        bias: both layers have one.
        skip_tokens: leading tokens of every block that are not read (1 for a CLS token).

    Shape: M tensors [B, T, dim] -> [B, T - skip_tokens, out_dim].  Source: MBTF of arXiv 2506.07138.
    """

    def __init__(
        self, num_blocks: int, dim: int, hidden_dim: int | None = None, out_dim: int | None = None, *,
        activation: str | None = "gelu", bias: bool = True, skip_tokens: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        checks.check_int("num_blocks", num_blocks, 1, checks.MAX_BLOCKS)
        checks.check_int("dim", dim, 1)
        checks.check_int("skip_tokens", skip_tokens, 0)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        super().__init__(
            num_blocks * dim, hidden_dim, dim if out_dim is None else out_dim, activation, bias, device, dtype
        )
        self.num_blocks, self.dim, self.skip_tokens = num_blocks, dim, skip_tokens

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        check_module_blocks(blocks, self.num_blocks, self.dim, self.skip_tokens)
        readable = self.readable()
        if readable is not None:
            return run_chain(ops.token_fusion_mlp, blocks, *readable, self.activation, self.skip_tokens, 1, 0, 0)
        plain = plain_parameters(self.linear_1)
        if plain is not None:
            hidden = concat_linear(blocks, *plain, activation=self.activation, skip_tokens=self.skip_tokens)
        else:
            joined = torch.cat([block[:, self.skip_tokens :] for block in blocks], dim=-1)
            hidden = activate(call_linear("linear_1", self.linear_1, joined), self.activation)
        return self._linear_2(hidden)

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, activation={self.activation!r}, skip_tokens={self.skip_tokens}"


class SpatialTokenFusion(_TwoLayers):
    """Fuse every r x r neighbourhood of tokens into one: linear_2(act(linear_1(merge_rxr(x)))).

    Args:
        dim: C, channels of a token.
        out_dim: width of the output.
        merge_size: r, from 1 to 16.
        hidden_dim: width of the hidden layer, 4*r*r*dim by default.
        activation: None, "gelu" (exact), "gelu_tanh" or "silu".
        bias: both layers have one.
        truncate: drop the last rows and columns of a grid that r does not divide; without it that is an error.
        feature_order: the order in which linear_1.weight is stored: "patch_major" (dy*r + dx)*C + c, which the
            kernels read as it is, or "channel_major" c*r*r + dy*r + dx (F.unfold, the official weights), which is
            relaid out on every call in training and once while frozen and in eval mode; see `refresh`.

    Shape: [B, H*W, dim] -> [B, (H//r)*(W//r), out_dim].  Source: STF of arXiv 2506.07138.
    """

    def __init__(
        self, dim: int, out_dim: int, *, merge_size: int = 2, hidden_dim: int | None = None,
        activation: str | None = "gelu", bias: bool = True, truncate: bool = False,
        feature_order: str = "patch_major",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        checks.check_int("dim", dim, 1)
        checks.check_int("merge_size", merge_size, 1, 16)
        checks.check_choice("feature_order", feature_order, checks.FEATURE_ORDERS)
        checks.check_bool("truncate", truncate)
        window = merge_size**2
        hidden_dim = 4 * window * dim if hidden_dim is None else hidden_dim
        super().__init__(window * dim, hidden_dim, out_dim, activation, bias, device, dtype)
        self.dim, self.merge_size, self.truncate, self.feature_order = dim, merge_size, truncate, feature_order
        self._relayout = FrozenRelayout()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x [B, H*W, dim]; grid (H, W), or None for a square."""
        checks.check_tokens("x", x)
        check_width("x", x, self.dim)
        height, width = checks.resolve_grid(grid, x.shape[1], self.merge_size, self.truncate)
        readable = self.readable()
        if readable is not None:
            return run_chain(ops.token_fusion_mlp, [x], *readable, self.activation, 0, self.merge_size, height, width)
        plain = plain_parameters(self.linear_1)
        if plain is not None:
            weight, bias = plain
            hidden = spatial_merge_linear(
                x, self.patch_major(weight), bias, grid=(height, width), merge_size=self.merge_size,
                activation=self.activation, truncate=self.truncate,
            )  # fmt: skip
        else:
            merged = self._merged(x, height, width)
            hidden = activate(call_linear("linear_1", self.linear_1, merged), self.activation)
        return self._linear_2(hidden)

    def readable(self) -> tuple[list[Tensor], list[Tensor]] | None:
        found = super().readable()
        if found is not None:
            found[0][0] = self.patch_major(found[0][0])
        return found

    def patch_major(self, weight: Tensor) -> Tensor:
        """linear_1's weight in the order that the kernels read."""
        if self.feature_order == "patch_major":
            return weight
        return self._relayout.get(weight, lambda w: channel_to_patch_major(w, self.merge_size), self.training)

    def refresh(self) -> None:
        """Forget the relaid-out copy; call it after changing a frozen channel-major weight through `.data`."""
        self._relayout.clear()

    def _merged(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, H*W, C] -> [B, (H//r)*(W//r), r*r*C] in feature_order, for a linear_1 that is called as a module."""
        windows = ops.split_windows(x, (height, width), self.merge_size)
        axes = (0, 1, 3, 2, 4, 5) if self.feature_order == "patch_major" else (0, 1, 3, 5, 2, 4)
        return windows.permute(axes).flatten(3).flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"merge_size={self.merge_size}, activation={self.activation!r}, truncate={self.truncate}, "
            f"feature_order={self.feature_order!r}"
        )


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
        skip_tokens: leading tokens of every block that are not read (1 for a CLS token).
        mbtf: False, with num_blocks=1, leaves MBTF out: STF alone.
        mbtf_hidden_dim: 4*dim by default.  stf_hidden_dim: 4*r*r*dim by default.
        activation, bias, truncate, feature_order: as for the children.

    Shape: M tensors [B, skip_tokens + H*W, dim] -> [B, (H//r)*(W//r), out_dim].  Source: arXiv 2506.07138.
    """

    def __init__(
        self, num_blocks: int, dim: int, out_dim: int, *, merge_size: int = 2, skip_tokens: int = 0, mbtf: bool = True,
        mbtf_hidden_dim: int | None = None, stf_hidden_dim: int | None = None, activation: str | None = "gelu",
        bias: bool = True, truncate: bool = False, feature_order: str = "patch_major",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
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
        shared = {"activation": activation, "bias": bias, "device": device, "dtype": dtype}
        self.mbtf = (
            MultiBlockTokenFusion(num_blocks, dim, mbtf_hidden_dim, skip_tokens=skip_tokens, **shared) if mbtf else None
        )
        self.stf = SpatialTokenFusion(
            dim, out_dim, merge_size=merge_size, hidden_dim=stf_hidden_dim, truncate=truncate,
            feature_order=feature_order, **shared,
        )  # fmt: skip

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
        inputs_embeds without another pass. Inference only. Rows must be distinct; on a GPU their values are not
        checked, and one outside `out` is not written.
        """
        check_module_blocks(blocks, self.num_blocks, self.dim, self.skip_tokens)
        stf = self._modules["stf"]  # an attribute look-up of a child takes most of a microsecond
        height, width = checks.resolve_grid(grid, blocks[0].shape[1] - self.skip_tokens, stf.merge_size, stf.truncate)
        if out is not None or rows is not None:
            count = blocks[0].shape[0] * (height // stf.merge_size) * (width // stf.merge_size)
            self._check_target(blocks, out, rows, count)
        readable = self._readable()
        if readable is not None:
            static = (stf.activation, self.skip_tokens, stf.merge_size, height, width)
            if out is None:
                return run_chain(ops.compact_token_projector, blocks, *readable, *static)
            run_chain(ops.compact_token_projector_out, blocks, *readable, *static, out, rows)
            return out
        x = blocks[0][:, self.skip_tokens :] if self.mbtf is None else self.mbtf(blocks)
        z = stf(x, (height, width))
        return z if out is None else out.index_copy_(0, rows, z.flatten(0, 1).to(out.dtype))

    def refresh(self) -> None:
        """Forget the relaid-out copy of a frozen channel-major weight; see SpatialTokenFusion.refresh."""
        self.stf.refresh()

    def _readable(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """(weights, biases) of the four layers if both children can be read instead of called."""
        mbtf, stf = self._modules.get("mbtf"), self._modules["stf"]
        if mbtf is None or not (is_untouched(mbtf, MultiBlockTokenFusion) and is_untouched(stf, SpatialTokenFusion)):
            return None
        first, second = mbtf._modules, stf._modules
        found = plain_layers((first["linear_1"], first["linear_2"], second["linear_1"], second["linear_2"]))
        if found is None or mbtf.activation != stf.activation:
            return None
        found[0][2] = stf.patch_major(found[0][2])
        return found

    def _check_target(self, blocks: Sequence[Tensor], out: Tensor | None, rows: Tensor | None, count: int) -> None:
        checks.check_out(out, rows, count, self.out_dim, blocks[0])
        if torch.is_grad_enabled() and (
            out.requires_grad
            or any(block.requires_grad for block in blocks)
            or any(p.requires_grad for p in self.parameters())
        ):
            raise ValueError(
                "out: writing into `out` is for inference and keeps no gradient; call it under torch.no_grad(), or "
                "without out and rows"
            )

    def extra_repr(self) -> str:
        return f"num_blocks={self.num_blocks}, skip_tokens={self.skip_tokens}"


def check_width(name: str, x: Tensor, dim: int) -> None:
    if x.shape[-1] != dim:
        raise ValueError(f"{name}: expected {dim} channels (dim), got shape {tuple(x.shape)}")


def check_module_blocks(blocks: Sequence[Tensor], num_blocks: int, dim: int, skip_tokens: int) -> None:
    checks.check_blocks(blocks, num_blocks)
    check_width("blocks[0]", blocks[0], dim)
    checks.check_skip(skip_tokens, blocks[0].shape[1])


LAYERS = ("mbtf.linear_1.", "mbtf.linear_2.", "stf.linear_1.", "stf.linear_2.")
CHILD_LAYERS = ("linear_1.", "linear_2.")


def run_chain(
    operator, blocks: Sequence[Tensor], weights: list[Tensor], biases: list[Tensor],
    activation: str | None, skip_tokens: int, merge_size: int, *rest,
):  # fmt: skip
    """Call a fused chain in the dtype that autocast asks for.

    Parameters can be replaced after construction and a kernel takes its sizes from them: one that does not fit the
    layer before it is refused here.
    """
    blocks, weights, biases = cast_operands(blocks, weights, biases)
    x, window, whole = blocks[0], merge_size**2, len(weights) == len(LAYERS)
    width = len(blocks) * x.shape[2] * (1 if whole else window)
    layers = LAYERS if whole else CHILD_LAYERS
    for i, (weight, bias, layer) in enumerate(zip(weights, biases or [None] * len(weights), layers, strict=True)):
        checks.check_linear(weight, bias, width, "the width of its input", "blocks", x, layer)
        width = weight.shape[0] * (window if whole and i == 1 else 1)
    return operator(list(blocks), weights, biases, activation, skip_tokens, merge_size, *rest)
