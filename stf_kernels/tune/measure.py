"""The time of one way to compute a problem on the GPU at hand.

A measurement is a median over repetitions, each on a cold cache and replayed from a CUDA graph (timing.py).
"""

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from ..configs import GemmConfig
from ..ops import launch, torch_path, weight_grad
from .problems import Problem
from .timing import Flush, capture, replay

_WARM_UP, _REPEATS = 3, 30


class ProblemBench:
    """Operands of one problem on the GPU, and the time of one way to compute it."""

    def __init__(self, problem: Problem, dtype: torch.dtype, batch: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator).to(dtype)

        problem = replace(problem, index_rows=False)  # as `_run` has it
        self._problem, self._flush = problem, Flush("cuda")
        self._expected: Tensor | None = None
        self._broken: set[GemmConfig] = set()
        self._blocks, weight, self._bias = problem.operands(draw, batch)
        self._weight = weight / problem.k**0.5
        self._g = draw(batch * problem.tokens, problem.n) if problem.wgrad else None

    def compile(self, configs: Sequence[GemmConfig]) -> None:
        """All of them at once, on every core. One that the compiler refuses does not run; it is named."""

        def compile_one(config: GemmConfig) -> None:
            try:
                found = self._problem.arguments(config, self._blocks, self._weight, self._bias)
                kernel, grid, operands, sizes, constants = found
                kernel.warmup(*operands, *sizes, grid=grid, **constants, **config.compiler_options())
            except Exception as error:  # the compiler raises what it likes
                self._broken.add(config)
                print(f"{self._problem.name}: {config} does not compile: {str(error).splitlines()[0]:.100}", flush=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, configs))

    def microseconds(self, config: GemmConfig | None) -> float | None:
        """Median on a cold cache; config None is the torch path (cuBLAS). None where it does not run."""
        if config in self._broken:
            return None
        try:
            found = self._run(config)
            if config is not None:
                self._check(found)
            graph = capture(lambda: self._run(config))
            replay(graph, self._flush, _WARM_UP)
            return statistics.median(replay(graph, self._flush, _REPEATS))
        except launch.does_not_run():
            return None

    def _run(self, config: GemmConfig | None) -> Tensor:
        if self._g is not None:
            if config is None:
                return weight_grad.by_library(self._g, self._blocks, self._weight.shape, self._problem.stage)
            return weight_grad.launch_wgrad(self._g, self._blocks, self._problem.stage, config)
        operands = (self._blocks, self._weight, self._bias, self._problem.stage)
        return (torch_path.run_stage(*operands) if config is None else launch.run_stage(*operands, config))[0]

    def _check(self, found: Tensor) -> None:
        """A configuration that computes something else is a defect to report, not a time to note."""
        if self._expected is None:
            self._expected = self._run(None)
        error = (found.double() - self._expected.double()).norm() / self._expected.double().norm()
        if not error < (0.02 if found.dtype != torch.float32 else 2e-3):  # some roundings of 16 bit, of tf32
            raise RuntimeError(f"{self._problem.name}: the kernel differs from the torch path by {float(error):.3g}")
