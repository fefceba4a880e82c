"""spatial_merge_linear: y = act(merge_rxr(x) @ W^T + b), one stage of r*r segments.  (STF, first layer)"""

from .registration import ChainOperator, Plan
from .stage import Stage


def _plan(activation: str | None, skip_tokens: int, merge_size: int, grid_h: int, grid_w: int) -> Plan:
    return Plan((Stage(activation, gather=merge_size, grid=(grid_h, grid_w)),), skip_tokens)


spatial_merge_linear = ChainOperator(
    "spatial_merge_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    "str? activation, int skip_tokens, int merge_size, int grid_h, int grid_w",
    _plan,
)
