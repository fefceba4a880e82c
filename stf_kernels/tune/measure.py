"""The time of each way to compute a problem on the GPU at hand, as selection measures it, in more repetitions."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..configs import GemmConfig
from ..ops import first_use, launch, weight_grad
from .problems import Problem

_ROUNDS = 60


def product_of(problem: Problem, dtype: torch.dtype, batch: int) -> first_use.Product:
    """A problem on random operands, its rows not indexed: what an entry of a table is for does not know of that."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    problem = replace(problem, index_rows=False)
    blocks, weight, bias = problem.operands(draw, batch)
    if problem.wgrad:
        g = draw(batch * problem.tokens, problem.n)
        return weight_grad.product_of(g, blocks, weight.shape, problem.stage)
    return launch.product_of((blocks, weight / problem.k**0.5, bias), problem.stage)


def measure(
    problem: Problem, dtype: torch.dtype, batch: int, configs: Sequence[GemmConfig]
) -> dict[GemmConfig | None, float]:
    """Microseconds of plain torch (None) and of what is right; the others are named."""
    failed: dict[GemmConfig, str] = {}
    us = first_use.measure(lambda: product_of(problem, dtype, batch), configs, failed, _ROUNDS)
    for config, reason in failed.items():
        print(f"{problem.name}: {config} is left out: {reason:.100}", flush=True)
    return us
