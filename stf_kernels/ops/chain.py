"""Stages in a row: the forward, and what it keeps for the backward (backward.py).

Kept at most, beside the caller's own blocks and weights: of each stage but the last its output, of each with an
activation its pre-activation, too. For the projector of LLaVA-1.5 in 16 bit that is 20 MB an image; plain PyTorch also
keeps the concatenation, 9.4 MB.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch, torch_path
from .segments import Stage


class Plan(NamedTuple):
    """What an operator computes: its stages, and how many leading tokens of every block are not read."""

    stages: tuple[Stage, ...]
    skip_tokens: int


def chain_fwd(
    plan: Plan,
    path: str,
    blocks: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    keep: Sequence[bool] = (),
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Run the stages -> (output of the last, [pre-activation, output] of every stage: None unless `keep` flags it).

    path: see backend.resolve. biases may be empty. With out and rows the last stage writes its row i to out[rows[i]].
    """
    stages, skip = plan
    if stages[0].merge_in > 1 and len(blocks) > 1:
        raise ValueError(f"blocks: a stage that merges on load takes one block, got {len(blocks)}")
    x: Sequence[Tensor] = [block.narrow(1, skip, block.shape[1] - skip) for block in blocks] if skip else blocks
    saved: list[Tensor | None] = []
    last, asked = len(stages) - 1, None
    if path == "auto":
        asked = launch.chain_of(x, weights, plan, keep)
        if launch.chain_is_plain(asked):
            path, asked = "torch", None
    for i, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        bias = biases[i] if biases else None
        save_pre, save_out = keep[2 * i : 2 * i + 2] if keep else (False, False)
        save_pre = save_pre and stage.activation is not None
        into, at = (out, rows) if i == last else (None, None)
        if path == "torch" or (path == "auto" and launch.is_plain(x, weight, stage, save_pre)):
            y, pre = torch_path.run_stage(x, weight, bias, stage, save_pre, out=into, rows=at)
        else:
            forced, asked = path == "triton", None
            y, pre = launch.run_stage(x, weight, bias, stage, forced=forced, save_pre=save_pre, out=into, rows=at)
        saved += [pre, y if save_out else None]
        x = [y]
    if asked is not None:
        launch.keep_plain(asked)
    return y, saved


def without_autocast(device_type: str) -> AbstractContextManager:
    """An operator computes in the dtype of its operands: functional.py and modules.py have cast them."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
