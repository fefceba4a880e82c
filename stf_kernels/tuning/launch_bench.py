"""What each way to launch (launches.py) is worth on the GPU at hand, measured on the chain at batch 1."""

import os
import statistics
import time

import torch

from ..ops import launch
from ..problems import PROBLEMS
from .launches import VARIABLES
from .lookup import choose
from .timing import Flush, capture, replay


class LaunchBench:
    """The chain's four launches at batch 1, with the configurations that serve them, and their times either way."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._launch, self._flush, self._steps = launch.launch_stage, Flush("cuda"), []
        concat = PROBLEMS["concat"]
        self._blocks = [torch.randn(1, 577, concat.c, device="cuda").to(dtype)[:, 1:] for _ in range(concat.num_blocks)]
        for name in ("concat", "linear_merge", "linear", "linear_scatter"):
            p = PROBLEMS[name]
            weight = (torch.randn(p.n, p.k, device="cuda") / p.k**0.5).to(dtype)
            kind = p.stage.kind(p.num_blocks)
            config = choose(weight.device, kind, dtype, p.tokens, p.n, p.k, may_decline=False)
            self._steps.append((weight, None, p.stage, config))

    def _chain(self) -> torch.Tensor:
        x = self._blocks
        for step in self._steps:
            x = [self._launch(x, *step)[0]]
        return x[0]

    def measure(self, name: str) -> dict[str, float]:
        """{"us", "rival_us"} with and without it; RuntimeError if the bits of the result differ."""
        before, times, results = os.environ.get(VARIABLES[name]), {}, []
        try:
            for flag, field in (("0", "rival_us"), ("1", "us")):
                os.environ[VARIABLES[name]] = flag
                for _ in range(3):  # compiled, then launched the way that is measured
                    result = self._chain()
                results.append(result)
                times[field] = self._host() if name == "direct" else self._captured()
        finally:
            os.environ.pop(VARIABLES[name])
            if before is not None:
                os.environ[VARIABLES[name]] = before
        if not torch.equal(*results):
            raise RuntimeError(f"launches.{name}: the chain's result has other bits than without it")
        return times

    def _host(self) -> float:
        samples = []
        for _ in range(50):
            torch.cuda.synchronize()
            began = time.perf_counter()
            self._chain()
            samples.append(1e6 * (time.perf_counter() - began))
        return statistics.median(samples)

    def _captured(self) -> float:
        graph = capture(self._chain)
        replay(graph, self._flush, 3)
        return statistics.median(replay(graph, self._flush, 50))
