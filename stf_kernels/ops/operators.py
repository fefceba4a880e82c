"""The operators: each a chain of stages, registered with torch.library and called past the dispatcher (autograd.py).

concat_linear                act(concat(blocks) W + b)                                  1 stage
spatial_merge_linear         act(merge(x) W + b)                                        1 stage
token_fusion_mlp             act(concat(blocks) W1 + b1) W2 + b2, or with a merge(x)     2 stages
compact_token_projector      the two in a row: W2's GEMM merges its rows on store        4 stages
compact_token_projector_out  the same, its last rows written to out[rows[i]]; inference only

All take (blocks, weights, biases, activation, skip_tokens, merge_size, grid_h, grid_w); merge_size 1 merges nothing.
"""

import torch

from ..backend import resolve
from .autograd import STATIC, TENSORS, ChainOperator, define, is_ordinary, is_recorded
from .chain import Plan, chain_fwd, without_autocast
from .segments import Stage


def _one_layer(activation: str | None, skip_tokens: int, merge_size: int, grid_h: int, grid_w: int) -> Plan:
    return Plan((Stage(activation, merge_in=merge_size, grid=(grid_h, grid_w)),), skip_tokens)


def _two_layers(activation: str | None, skip_tokens: int, merge_size: int, grid_h: int, grid_w: int) -> Plan:
    return Plan((Stage(activation, merge_in=merge_size, grid=(grid_h, grid_w)), Stage()), skip_tokens)


def _four_layers(activation: str | None, skip_tokens: int, merge_size: int, grid_h: int, grid_w: int) -> Plan:
    merging = Stage(merge_out=merge_size, grid=(grid_h, grid_w))
    return Plan((Stage(activation), merging, Stage(activation), Stage()), skip_tokens)


concat_linear = ChainOperator("concat_linear", _one_layer)
spatial_merge_linear = ChainOperator("spatial_merge_linear", _one_layer)
token_fusion_mlp = ChainOperator("token_fusion_mlp", _two_layers)
compact_token_projector = ChainOperator("compact_token_projector", _four_layers)


def _project_into(blocks, weights, biases, *static_out_rows) -> None:
    *static, out, rows = static_out_rows
    path = resolve(blocks[0].device, blocks[0].dtype)
    with without_autocast(out.device.type):
        chain_fwd(compact_token_projector.plan(*static), path, blocks, weights, biases, out=out, rows=rows)


_INTO = f"{TENSORS}, {STATIC}, Tensor(a!) out, Tensor rows"
_project_into_op = define("compact_token_projector_out", _INTO, "()", _project_into, lambda *arguments: None)


def compact_token_projector_out(blocks, weights, biases, *static_out_rows) -> None:
    """Outside torch.compile past the dispatcher, as ChainOperator does."""
    tensors = (*blocks, *weights, *biases, *static_out_rows[-2:])
    if torch.compiler.is_compiling() or not is_ordinary(tensors) or is_recorded(blocks[0]):
        _project_into_op(blocks, weights, biases, *static_out_rows)
        return
    with torch.no_grad():
        _project_into(blocks, weights, biases, *static_out_rows)
