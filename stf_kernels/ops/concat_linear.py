"""concat_linear: y = act(concat(blocks, -1) @ W^T + b), one stage of M segments.  (MBTF, first layer)"""

from .registration import ChainOperator, Plan
from .stage import Stage


def _plan(activation: str | None, skip_tokens: int) -> Plan:
    return Plan((Stage(activation),), skip_tokens)


concat_linear = ChainOperator(
    "concat_linear", "Tensor[] blocks, Tensor weight, Tensor? bias", "str? activation, int skip_tokens", _plan
)
