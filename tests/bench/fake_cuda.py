"""A GPU that is not there: torch.cuda as the benches use it, over the CPU; so their GPU code runs before a GPU does.

Times are the host's clock, memory is made up. Tensors that are asked for on "cuda" are made on the CPU.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import llava_integration  # noqa: F401   now: transformers imports torchao where it is, and that asks the GPU who it is


class Event:
    """Records the host's clock. `made` keeps the arguments of each."""

    made: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.made.append(options)
        self.options = options
        self.at: float | None = None

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None
        assert end.at is not None
        return 1e3 * (end.at - self.at)


class OnCpu(TorchFunctionMode):
    """device="cuda" becomes device="cpu" in every call of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        moved = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_cpu, args), **moved)


def _cpu(value: Any) -> Any:
    gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return "cpu" if gpu else value


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.made.clear()
    answers = {
        "is_available": True, "get_device_name": "Pretended GPU", "synchronize": None, "memory_allocated": 1 << 30,
        "max_memory_allocated": 3 << 30, "reset_peak_memory_stats": None, "empty_cache": None,
        "mem_get_info": (140 << 30, 141 << 30), "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
