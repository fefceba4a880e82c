"""The operands of the kernel table: every stage's input and parameters, their float64 twins, and their gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .problems import STAGES, Sizes, eager_chain, eager_stage, random_blocks, stage_parameters


class Operands:
    """Inputs of every stage at one batch size and dtype: each stage reads the eager output of the one before."""

    def __init__(self, projector: nn.Module, sizes: Sizes, batch: int, *, device: str, dtype: torch.dtype) -> None:
        self.projector, self.sizes, self.batch, self.dtype = projector, sizes, batch, dtype
        self.parameters = stage_parameters(projector)
        self.blocks = random_blocks(sizes, batch, device=device, dtype=dtype, seed=batch)
        self.inputs: dict[str, list[Tensor] | Tensor] = {"G1": self.blocks}
        x: list[Tensor] | Tensor = self.blocks
        for stage, following in itertools.pairwise(STAGES):
            x = self.inputs[following] = eager_stage(stage, x, *self.parameters[stage], sizes)
        self._sent: Tensor | None = None

    def exact(self, stage: str, *, backward: bool = False) -> Tensor:
        """float64 from the operands as they are, in the stage's layout; of a backward all gradients in one row."""
        wide = self.doubled()
        if not backward:
            return wide.eager(stage)
        return flat(wide.gradients(stage, lambda: wide.eager(stage)))

    def doubled(self) -> Operands:
        """The same operands in float64, requiring a gradient where these do."""

        def double(x: Any) -> Any:
            return [double(item) for item in x] if isinstance(x, list) else _wide(x)

        found = copy.copy(self)
        found.parameters = {name: tuple(map(_wide, pair)) for name, pair in self.parameters.items()}
        found.inputs = {name: double(x) for name, x in self.inputs.items()}
        found.blocks = found.inputs["G1"]
        return found

    def eager(self, stage: str) -> Tensor:
        if stage == "chain":
            return eager_chain(self.blocks, self.parameters, self.sizes)
        return eager_stage(stage, self.inputs[stage], *self.parameters[stage], self.sizes)

    def require_grad(self) -> None:
        """As in training with a frozen tower: of the parameters, and of every stage's input but the tower's blocks."""
        for tensor in (*itertools.chain(*self.parameters.values()), *(self.inputs[stage] for stage in STAGES[1:])):
            tensor.requires_grad_(True)

    def gradients(self, stage: str, forward: Callable[[], Tensor]) -> list[Tensor]:
        """Of a stage or the chain, for an upstream gradient of unit variance that is the same for everybody."""
        leaves = [*itertools.chain(*self.parameters.values())] if stage == "chain" else [*self.parameters[stage]]
        leaves += [self.inputs[stage]] if stage in STAGES[1:] else []
        with torch.enable_grad():
            y = forward()
            return list(torch.autograd.grad(y, leaves, self._upstream(y)))

    def _upstream(self, y: Tensor) -> Tensor:
        if self._sent is None or (self._sent.shape, self._sent.dtype) != (y.shape, y.dtype):
            generator = torch.Generator(y.device).manual_seed(7)
            self._sent = torch.randn(y.shape, device=y.device, generator=generator).to(self.dtype).to(y.dtype)
        return self._sent


def _wide(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])
