"""What the projector has to beat: each a stage as a function of its input, so that the chain can be built of it too.

strided           G1 as one cuBLAS operand over a preallocated [B, 577, 8, C] buffer that the tower would fill
conv2d            G3 as cuDNN's convolution of window 2, stride 2, on channels_last
addmm_activation  G1 and G3 with cuBLASLt's epilogue; its GELU is tanh on CUDA, an error that is reported and not hidden
compile           torch.compile of the eager form, max-autotune without its own CUDA graphs
compile-tma       the same with persistent TMA kernels among what it chooses from
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problems import STAGES, eager_chain, eager_stage, merge

TANH = "addmm_activation"
STAGES_OF = {"strided": ("G1",), "conv2d": ("G3",), TANH: ("G1", "G3")}


def rivals_of(stage: str) -> list[str]:
    """Names of the rivals that replace a stage, or some stage of the chain."""
    return [name for name, stages in STAGES_OF.items() if stage == "chain" or stage in stages]


def rival(name: str, stage: str, operands: Any) -> Callable[[], Tensor]:
    """The call of a rival; in a chain the stages that it has no form for are the eager ones."""
    if stage != "chain":
        replacement, x = _stage(name, stage, operands), operands.inputs[stage]
        return lambda: replacement(x)
    replaced = {s: _stage(name, s, operands) for s in STAGES_OF[name]}

    def chain() -> Tensor:
        x: list[Tensor] | Tensor = operands.blocks
        for s in STAGES:
            x = replaced[s](x) if s in replaced else eager_stage(s, x, *operands.parameters[s], operands.sizes)
        return x

    return chain


def compiled(name: str, stage: str, operands: Any) -> Callable[[], Tensor]:
    """torch.compile of the eager form; its first call takes a minute."""
    import torch._inductor

    sizes, parameters = operands.sizes, operands.parameters
    tuning = dict(torch._inductor.list_mode_options("max-autotune-no-cudagraphs"))
    if name == "compile-tma":
        tuning["triton.enable_persistent_tma_matmul"] = True
    # One piece or an error, and no limit of recompilations from steps before: a rival must not be eager in disguise.
    torch._dynamo.reset()
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": tuning}
    if stage == "chain":
        chain = torch.compile(lambda blocks: eager_chain(blocks, parameters, sizes), **options)
        return lambda: chain(operands.blocks)
    x, (w, b) = operands.inputs[stage], parameters[stage]
    one = torch.compile(lambda x: eager_stage(stage, x, w, b, sizes), **options)
    return lambda: one(x)


def _stage(name: str, stage: str, operands: Any) -> Callable[[Any], Tensor]:
    if name == "strided":
        return _strided(operands)
    return _conv2d(operands) if name == "conv2d" else _addmm_activation(stage, operands)


def _strided(operands: Any) -> Callable[[Any], Tensor]:
    w, b = operands.parameters["G1"]
    buffer = torch.stack(operands.blocks, dim=2).flatten(2)  # [B, 577, 8*C], filled before the clock starts
    return lambda _: F.gelu(F.linear(buffer[:, 1:], w, b))


def _conv2d(operands: Any) -> Callable[[Any], Tensor]:
    sizes, (w, b) = operands.sizes, operands.parameters["G3"]

    def call(x: Tensor) -> Tensor:
        # Views alone: W[n, (dy dx c)] lies as a kernel [n, c, dy, dx] in channels_last does, tokens as an image.
        kernel = w.view(w.shape[0], sizes.merge, sizes.merge, sizes.dim).permute(0, 3, 1, 2)
        image = x.transpose(1, 2).unflatten(2, (sizes.grid, sizes.grid))
        return F.gelu(F.conv2d(image, kernel, b, stride=sizes.merge)).flatten(2).transpose(1, 2)

    return call


def _addmm_activation(stage: str, operands: Any) -> Callable[[Any], Tensor]:
    sizes, batch, (w, b) = operands.sizes, operands.batch, operands.parameters[stage]

    def call(x: Any) -> Tensor:
        a = torch.cat([block[:, 1:] for block in x], -1) if stage == "G1" else merge(x, sizes)
        return torch._addmm_activation(b, a.flatten(0, 1), w.t(), use_gelu=True).unflatten(0, (batch, -1))

    return call
