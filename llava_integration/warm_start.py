"""An LLaVA-STF that, untrained, computes the r x r average of a stock LLaVA's image tokens, exactly in real arithmetic.

    stock    L2(act(L1 x))          L1 [P, C], L2 [D, P]          x = hidden_states[selected], act(x) - act(-x) = x
    W1 = [+I; -I; random; 0-bias]   on the segment of `selected`  W2 = [+I, -I, 0]             mbtf(blocks) = x
    W3 = blockdiag(L1, ..., L1)     r*r copies, patch-major       b3 = [c1; ...; c1]
    W4 = [L2, ..., L2] / (r*r)      r*r copies                    b4 = c2

The identity holds for GELU (erf and tanh) and SiLU: act(x) = x * s(x) with s(x) + s(-x) = 1. The random rows of W1 meet
zero columns of W2: the output stays exact and both receive gradients once training starts.
"""

import copy as copying
from collections.abc import Sequence

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from .core.config import default_blocks, prefix_tokens, resolve_layers, vision_grid
from .core.projector import build_projector
from .llava_stf import LlavaStfConfig, LlavaStfForConditionalGeneration

KEPT = ["vision_config", "text_config", "image_token_index", "projector_hidden_act", "multimodal_projector_bias"]
KEPT += ["tie_word_embeddings", "dtype"]


def from_llava(
    model: LlavaForConditionalGeneration,
    *,
    blocks: Sequence[int] | None = None,
    merge_size: int = 2,
    copy: bool = False,
    truncate: bool = False,
    mbtf_hidden_size: int | None = None,
) -> LlavaStfForConditionalGeneration:
    """LLaVA-STF from a stock LLaVA, such that its image tokens are avg_pool2d(stock image tokens, merge_size).

    Args:
        model: a LlavaForConditionalGeneration with one vision_feature_layer and select strategy "default"; unchanged.
        blocks: tower layers in concatenation order; must contain the one that `model` selects. Default:
            `default_blocks`.
        merge_size: side of the window that becomes one token.
        copy: copy tower and language model; otherwise both models share them.
        truncate: drop the last rows and columns of a grid that merge_size does not divide; otherwise that is an error.
        mbtf_hidden_size: width of MBTF, default 4 * C; at least 2 * C.

    Raises:
        TypeError: `model` is something else, or its projector is not two plain nn.Linear any more.
        ValueError: `model` cannot be averaged exactly, or blocks, merge_size, mbtf_hidden_size do not fit it.
    """
    _check_model(model)
    if type(merge_size) is not int:
        raise TypeError(f"merge_size: expected an int, got {merge_size!r}")
    if mbtf_hidden_size is not None and type(mbtf_hidden_size) is not int:
        raise TypeError(f"mbtf_hidden_size: expected an int or None, got {mbtf_hidden_size!r}")
    for name, value in (("copy", copy), ("truncate", truncate)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {value!r}")
    config = _stf_config(model, blocks, merge_size, truncate, mbtf_hidden_size)
    stock = model.model.multi_modal_projector
    weight = stock.linear_1.weight

    with torch.device("meta"):
        stf = LlavaStfForConditionalGeneration(config)
    shared = (model.model.vision_tower, model.model.language_model, model.lm_head)
    tower, language_model, head = copying.deepcopy(shared) if copy else shared  # in one go: embeddings may be tied
    stf.model.vision_tower, stf.model.language_model, stf.lm_head = tower, language_model, head
    config.vision_config, config.text_config = tower.config, language_model.config
    projector = build_projector(config, device=weight.device, dtype=weight.dtype)
    warm_start_projector(projector, stock.linear_1, stock.linear_2, config, _selected(model.config))
    stf.model.multi_modal_projector = projector
    stf.generation_config = copying.deepcopy(model.generation_config)
    return stf.train(model.training)


@torch.no_grad()
def warm_start_projector(
    projector: nn.Module, linear_1: nn.Linear, linear_2: nn.Linear, config: LlavaStfConfig, selected: int
) -> None:
    """Fill a CompactTokenProjector of `config` in place from the stock linears, which read layer `selected`."""
    copies = config.spatial_merge_size**2
    blocks = resolve_layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    if projector.mbtf is not None:
        _pass_through(projector.mbtf, blocks.index(selected), config.vision_config.hidden_size)
    stf = projector.stf
    stf.linear_1.weight.copy_(torch.block_diag(*[linear_1.weight] * copies))
    stf.linear_2.weight.copy_(torch.cat([linear_2.weight / copies] * copies, dim=1))
    if stf.linear_1.bias is not None:
        stf.linear_1.bias.copy_(linear_1.bias.repeat(copies))
        stf.linear_2.bias.copy_(linear_2.bias)


def _pass_through(mbtf: nn.Module, segment: int, dim: int) -> None:
    """mbtf(blocks) = blocks[segment]: act(x) - act(-x) = x in the first 2*dim hidden units, nothing from the others."""
    first, second = mbtf.linear_1.weight, mbtf.linear_2.weight
    eye = torch.eye(dim, device=first.device, dtype=first.dtype)
    columns = slice(segment * dim, (segment + 1) * dim)
    first[: 2 * dim].zero_()
    first[:dim, columns], first[dim : 2 * dim, columns] = eye, -eye
    nn.init.normal_(first[2 * dim :], std=0.02)
    second.zero_()
    second[:, :dim], second[:, dim : 2 * dim] = eye, -eye
    for linear in (mbtf.linear_1, mbtf.linear_2):
        if linear.bias is not None:
            linear.bias.zero_()


def _selected(config: LlavaConfig) -> int:
    return resolve_layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)[0]


def _stf_config(model: LlavaForConditionalGeneration, blocks, merge_size, truncate, mbtf_hidden_size) -> LlavaStfConfig:
    stock, width = model.config, model.model.multi_modal_projector.linear_1.out_features
    selected, dim = _selected(stock), stock.vision_config.hidden_size
    blocks = default_blocks(selected) if blocks is None else blocks
    blocks = resolve_layers(blocks, stock.vision_config.num_hidden_layers, name="blocks")
    if selected not in blocks:
        raise ValueError(f"blocks: expected layer {selected} among them, which the stock projector reads, got {blocks}")
    side, _ = vision_grid(stock.vision_config)
    if not 1 <= merge_size <= side or (side % merge_size and not truncate):
        raise ValueError(
            f"merge_size: expected a divisor of the {side}x{side} grid, got {merge_size}; "
            "truncate=True drops the last rows and columns"
        )
    if mbtf_hidden_size is not None and mbtf_hidden_size < 2 * dim:
        raise ValueError(
            f"mbtf_hidden_size: expected at least 2 * {dim} = {2 * dim} to pass a layer through exactly, "
            f"got {mbtf_hidden_size}"
        )
    config = LlavaStfConfig(
        **{name: copying.deepcopy(getattr(stock, name)) for name in KEPT},
        vision_feature_layer=blocks,
        spatial_merge_size=merge_size,
        spatial_merge_truncate=truncate,
        mbtf_hidden_size=mbtf_hidden_size,
        stf_hidden_size=merge_size**2 * width,
    )
    config._attn_implementation = stock._attn_implementation
    return config


def _check_model(model: LlavaForConditionalGeneration) -> None:
    if not isinstance(model, LlavaForConditionalGeneration) or isinstance(model, LlavaStfForConditionalGeneration):
        got = type(model).__name__
        raise TypeError(f"model: expected a stock transformers LlavaForConditionalGeneration, got {got}")
    config = model.config
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"model: expected one vision_feature_layer, got the list {config.vision_feature_layer}; "
            "its projector reads a concatenation that no average of tokens reproduces"
        )
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    if strategy != "default" or not prefix_tokens(tower):
        raise ValueError(
            "model: expected vision_feature_select_strategy='default' and a tower with a CLS token, got "
            f"{strategy!r} and {tower.model_type}; `convert official` takes trained weights of other towers"
        )
    projector = model.model.multi_modal_projector
    for name in ("linear_1", "linear_2"):
        linear = getattr(projector, name, None)
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"model: expected multi_modal_projector.{name} to be a plain nn.Linear, got {type(linear).__name__}; "
                "merge adapters and load without quantization first"
            )
        if linear.weight.is_meta:
            raise ValueError(f"model: multi_modal_projector.{name} is on the meta device; load it without offloading")
