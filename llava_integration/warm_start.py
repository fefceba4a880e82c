"""An LLaVA-STF that, untrained, computes the r x r average of a stock LLaVA's image tokens, exactly in real arithmetic.

    stock    L2(act(L1 x))          L1 [P, C], L2 [D, P]          x = hidden_states[selected], act(x) - act(-x) = x
    W1 = [+I; -I; random; 0-bias]   on the segment of `selected`  W2 = [+I, -I, 0]             mbtf(blocks) = x
    W3 = blockdiag(L1, ..., L1)     r*r copies, patch-major       b3 = [c1; ...; c1]
    W4 = [L2, ..., L2] / (r*r)      r*r copies                    b4 = c2

The identity holds for GELU (erf and tanh) and SiLU: act(x) = x * s(x) with s(x) + s(-x) = 1. The random rows of W1 meet
zero columns of W2: the output stays exact and both receive gradients once training starts.
"""

import copy as copying
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .core.config import default_blocks, prefix_tokens, resolve_layers, smallest_window, vision_grid
from .core.model import build_projector
from .core.register import Family, families

PROJECTOR = "multi_modal_projector"
# What a compact projector decides for itself, and what is true of a saved folder only.
NOT_KEPT = {"vision_feature_layer", "vision_feature_select_strategy", "image_seq_length"}
NOT_KEPT |= {"architectures", "transformers_version"}


def from_llava(
    model: PreTrainedModel,
    *,
    blocks: Sequence[int] | None = None,
    merge_size: int | None = None,
    copy: bool = False,
    truncate: bool = False,
    mbtf_hidden_size: int | None = None,
) -> PreTrainedModel:
    """The STF model of a stock LLaVA, such that the tokens of every tile are avg_pool2d(stock tokens, merge_size).

    LlavaForConditionalGeneration -> LlavaStfForConditionalGeneration, and so on for every family that is registered.

    Args:
        model: a stock ForConditionalGeneration with one vision_feature_layer, whose select strategy drops the CLS token
            of its tower and nothing else; unchanged.
        blocks: tower layers in concatenation order, with the one that `model` selects. Default: `default_blocks`.
        merge_size: side of the window that becomes one token. Default: the smallest from 2 that divides the tower's
            grid, 2 for 24x24 and 3 for 27x27; with `truncate`, 2.
        copy: copy tower and language model; otherwise both models share them.
        truncate: drop the last rows and columns of a grid that merge_size does not divide; otherwise that is an error.
        mbtf_hidden_size: width of MBTF, default 4 * C; at least 2 * C.

    Raises:
        TypeError: `model` is something else, or its projector is not two plain nn.Linear any more.
        ValueError: `model` cannot be averaged exactly, or blocks, merge_size, mbtf_hidden_size do not fit it.
    """
    family = next((family for family in families() if isinstance(model, family.stock)), None)
    if family is None or isinstance(model, family.generator):
        names = ", ".join(family.stock.__name__ for family in families())
        raise TypeError(f"model: expected a stock transformers {names}, got {type(model).__name__}")
    _check_model(model)
    for name, value in {"merge_size": merge_size, "mbtf_hidden_size": mbtf_hidden_size}.items():
        if value is not None and type(value) is not int:
            raise TypeError(f"{name}: expected an int or None, got {value!r}")
    for name, value in {"copy": copy, "truncate": truncate}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")
    stock = model.model.multi_modal_projector
    selected = resolve_layers(model.config.vision_feature_layer, model.config.vision_config.num_hidden_layers)[0]
    config = _stf_config(family, model.config, selected, blocks, merge_size, truncate, mbtf_hidden_size)
    config.stf_hidden_size = config.spatial_merge_size**2 * stock.linear_1.out_features

    with torch.device("meta"):
        stf = family.generator(config)
    parts = {name: part for name, part in model.model.named_children() if name != PROJECTOR}
    parts |= dict(model.model.named_parameters(recurse=False)) | {"": model.lm_head}
    if copy:
        parts = copying.deepcopy(parts)  # in one go: embeddings may be tied
    stf.lm_head = parts.pop("")
    for name, part in parts.items():
        setattr(stf.model, name, part)
    config.vision_config, config.text_config = parts["vision_tower"].config, parts["language_model"].config
    projector = build_projector(config, device=stock.linear_1.weight.device, dtype=stock.linear_1.weight.dtype)
    _fill(projector, stock, config.spatial_merge_size**2, config.vision_feature_layer.index(selected))
    stf.model.multi_modal_projector = projector
    stf.generation_config = copying.deepcopy(model.generation_config)
    return stf.train(model.training)


@torch.no_grad()
def _fill(projector: nn.Module, stock: nn.Module, copies: int, segment: int) -> None:
    """The weights at the top of this file, in place, for blocks of which `segment` is the one that `stock` reads."""
    stf = projector.stf
    stf.linear_1.weight.copy_(torch.block_diag(*[stock.linear_1.weight] * copies))
    stf.linear_2.weight.copy_(torch.cat([stock.linear_2.weight / copies] * copies, dim=1))
    if stf.linear_1.bias is not None:
        stf.linear_1.bias.copy_(stock.linear_1.bias.repeat(copies))
        stf.linear_2.bias.copy_(stock.linear_2.bias)

    first, second, dim = projector.mbtf.linear_1, projector.mbtf.linear_2, stock.linear_1.in_features
    eye = torch.eye(dim, device=first.weight.device, dtype=first.weight.dtype)
    columns = slice(segment * dim, (segment + 1) * dim)
    first.weight[: 2 * dim].zero_()
    first.weight[:dim, columns], first.weight[dim : 2 * dim, columns] = eye, -eye
    nn.init.normal_(first.weight[2 * dim :], std=0.02)
    second.weight.zero_()
    second.weight[:, :dim], second.weight[:, dim : 2 * dim] = eye, -eye
    for linear in (first, second):
        if linear.bias is not None:
            linear.bias.zero_()


def _stf_config(family: Family, stock, selected, blocks, merge_size, truncate, mbtf_hidden_size) -> PreTrainedConfig:
    dim = stock.vision_config.hidden_size
    blocks = default_blocks(selected) if blocks is None else blocks
    blocks = resolve_layers(blocks, stock.vision_config.num_hidden_layers, name="blocks")
    if selected not in blocks:
        raise ValueError(f"blocks: expected layer {selected} among them, which the stock projector reads, got {blocks}")
    side, _ = vision_grid(stock.vision_config)
    if merge_size is None:
        merge_size = smallest_window(side, truncate=truncate)
    if not 1 <= merge_size <= side or (side % merge_size and not truncate):
        raise ValueError(f"merge_size: expected a divisor of the {side}x{side} grid or truncate=True, got {merge_size}")
    if mbtf_hidden_size is not None and mbtf_hidden_size < 2 * dim:
        raise ValueError(f"mbtf_hidden_size: expected at least 2 * {dim} = {2 * dim}, got {mbtf_hidden_size}")
    kept = [field.name for field in dataclasses.fields(stock) if field.name not in NOT_KEPT]
    config = family.config(
        **{name: copying.deepcopy(getattr(stock, name)) for name in kept},
        vision_feature_layer=blocks,
        spatial_merge_size=merge_size,
        spatial_merge_truncate=truncate,
        mbtf_hidden_size=mbtf_hidden_size,
    )
    config._attn_implementation = stock._attn_implementation
    return config


def _check_model(model: PreTrainedModel) -> None:
    layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    if not isinstance(layer, int):
        raise ValueError(f"model: expected one vision_feature_layer, got the list {layer}, which no average reproduces")
    tower = model.config.vision_config
    expected = "default" if prefix_tokens(tower) else "full"
    if strategy != expected:
        what = f"vision_feature_select_strategy={expected!r} with a {tower.model_type}, its patches and nothing else"
        raise ValueError(f"model: expected {what}, got {strategy!r}")
    projector = model.model.multi_modal_projector
    if others := {name for name, _ in projector.named_children()} - {"linear_1", "act", "linear_2"}:
        raise TypeError(f"model: expected a multi_modal_projector of two linears alone, got {sorted(others)}")
    for name in ("linear_1", "linear_2"):
        linear = getattr(projector, name, None)
        if type(linear) is not nn.Linear:
            what = f"expected multi_modal_projector.{name} to be a plain nn.Linear, got {type(linear).__name__}"
            raise TypeError(f"model: {what}; merge adapters and load without quantization first")
        if linear.weight.is_meta:
            raise ValueError(f"model: multi_modal_projector.{name} is on the meta device; load it without offloading")
