"""Stages in a row: the forward, and what it keeps for the backward (backward.py).

Kept at most, beside the caller's own blocks and weights: of each stage with an activation its pre-activation, of each
other stage but the last its output. An activation's output is never kept: the backward reads the pre-activation once
and writes both act'(pre) * dy and act(pre) from it. For the projector of LLaVA-1.5 in 16 bit that is, per image,
576*4096 + 144*4096 + 144*16384 elements = 10.6 MB; plain PyTorch also keeps the concatenation (9.4 MB), both
activations' outputs (9.4 MB) and, in place of the fused output, its unfolded copy. What no wanted gradient reads is
not kept: where only the last layer trains, h's pre-activation alone, 4.7 MB (`Needs.keeps` in backward.py).
"""

from collections.abc import Sequence

from torch import Tensor

from .. import backend, tuning
from . import launch, torch_path
from .stage import Stage


def run_stage(
    blocks: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stage: Stage,
    *,
    save_pre: bool = False,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    triton: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One stage on the path that the backend and the device's table say -> (y or out, pre-activation or None).

    triton: the backend's answer, for who has asked it already.
    """
    x = blocks[0]
    if backend.use_triton(x.device, x.dtype) if triton is None else triton:
        config = _configuration(x, len(blocks), weight, stage, save_pre)
        if config is not None:
            try:
                return launch.launch_stage(blocks, weight, bias, stage, config, save_pre=save_pre, out=out, rows=rows)
            except launch.does_not_run() as error:
                tuning.reject(x.device, x.dtype, config, error)
            config = _configuration(x, len(blocks), weight, stage, save_pre)
            return launch.launch_stage(blocks, weight, bias, stage, config, save_pre=save_pre, out=out, rows=rows)
    y, pre = torch_path.run_stage(blocks, weight, bias, stage, save_pre)
    if out is None:
        return y, pre
    return out.index_copy_(0, rows, y.flatten(0, 1).to(out.dtype)), pre


def _configuration(
    x: Tensor, num_blocks: int, weight: Tensor, stage: Stage, save_pre: bool
) -> tuning.GemmConfig | None:
    """The device's choice; None is cuBLAS, the table's to name unless the user asked for Triton."""
    m = x.shape[0] * stage.tokens(x.shape)
    may_decline = backend.current_backend() == "auto"
    kind = stage.kind(num_blocks)
    return tuning.choose(x.device, kind, x.dtype, m, *weight.shape, may_decline=may_decline, save_pre=save_pre)


def chain_fwd(
    blocks: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stages: Sequence[Stage],
    *,
    keep: Sequence[bool] = (),
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run the stages -> (output of the last, what is kept of the stages that `keep` flags). blocks: [B, T, C] each."""
    saved: list[Tensor] = []
    x: Sequence[Tensor] = blocks
    last = len(stages) - 1
    triton = backend.use_triton(x[0].device, x[0].dtype)
    for i, (stage, weight, bias) in enumerate(zip(stages, weights, biases, strict=True)):
        kept = bool(keep) and keep[i]
        save_pre = kept and stage.activation is not None
        into, at = (out, rows) if i == last else (None, None)
        y, pre = run_stage(x, weight, bias, stage, save_pre=save_pre, out=into, rows=at, triton=triton)
        if kept:
            saved.append(y if pre is None else pre)
        x = [y]
    return y, saved
