"""The layers of the three modules as one chain, so that the backward keeps as little as it can.

MBTF        act(concat(blocks) W1 + b1) W2 + b2                                      2 stages
STF         act(merge(x) W3 + b3) W4 + b4                                            2 stages
projector   STF(MBTF(blocks)): W2's GEMM writes its rows merged, W3's reads them dense   4 stages
"""

import torch

from .registration import ChainOperator, Plan, define, is_ordinary, is_recorded, run_plan
from .stage import Stage


def _two_layers(activation: str | None, skip_tokens: int, merge_size: int, grid_h: int, grid_w: int) -> Plan:
    return Plan((Stage(activation, gather=merge_size, grid=(grid_h, grid_w)), Stage()), skip_tokens)


def _four_layers(activation: str | None, skip_tokens: int, merge_size: int, grid_h: int, grid_w: int) -> Plan:
    merged = Stage(scatter=merge_size, grid=(grid_h, grid_w))
    return Plan((Stage(activation), merged, Stage(activation), Stage()), skip_tokens)


_TENSORS = "Tensor[] blocks, Tensor[] weights, Tensor[] biases"
_STATIC = "str? activation, int skip_tokens, int merge_size, int grid_h, int grid_w"

token_fusion_mlp = ChainOperator("token_fusion_mlp", _TENSORS, _STATIC, _two_layers)
compact_token_projector = ChainOperator("compact_token_projector", _TENSORS, _STATIC, _four_layers)


def _project_into(blocks, weights, biases, *static_out_rows) -> None:
    *static, out, rows = static_out_rows
    run_plan(compact_token_projector.plan(*static), blocks, weights, biases, out=out, rows=rows)


def _fake_project_into(blocks, weights, biases, *static_out_rows) -> None:
    return None


# As a torch op: the last rows are written to out[rows[i]]. Inference only, out [R, D], rows int64 [B * tokens].
_project_into_op = define(
    "compact_token_projector_out", f"{_TENSORS}, {_STATIC}, Tensor(a!) out, Tensor rows", "()",
    _project_into, _fake_project_into,
)  # fmt: skip


def compact_token_projector_out(blocks, weights, biases, *static_out_rows) -> None:
    """Outside torch.compile past the dispatcher, as ChainOperator does."""
    tensors = (*blocks, *weights, *biases, *static_out_rows[-2:])
    if torch.compiler.is_compiling() or not is_ordinary(tensors) or is_recorded(blocks[0]):
        _project_into_op(blocks, weights, biases, *static_out_rows)
        return
    with torch.no_grad():
        _project_into(blocks, weights, biases, *static_out_rows)
