"""A GPU that is not there: torch.cuda as the benches use it, over the CPU; so their GPU code runs before a GPU does.

Times are the host's clock, memory is made up. Tensors that are asked for on "cuda" are made on the CPU.
"""

import time

import torch
from torch.overrides import TorchFunctionMode

import llava_integration.llava_stf  # noqa: F401   now: transformers imports torchao, and that asks the GPU who it is


class Event:
    made = []  # noqa: RUF012

    def __init__(self, **options):
        self.made.append(options)
        self.options = options

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class OnCpu(TorchFunctionMode):
    """device="cuda" becomes device="cpu" in every call of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def cpu(value):
            return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value

        return function(*map(cpu, args), **{name: cpu(value) for name, value in (kwargs or {}).items()})


def install(monkeypatch):
    Event.made.clear()
    answers = {"is_available": True, "get_device_name": "Pretended GPU", "mem_get_info": (140 << 30, 141 << 30)}
    answers |= {"memory_allocated": 1 << 30, "max_memory_allocated": 3 << 30, "is_current_stream_capturing": False}
    answers |= dict.fromkeys(("_sleep", "synchronize", "reset_peak_memory_stats", "empty_cache"))
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
