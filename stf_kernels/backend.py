"""Which path computes: Triton kernels or plain torch.

auto     on a GPU that Triton serves, for each product a kernel or plain torch as configs/selection.py says;
         plain torch elsewhere
triton   a Triton kernel for every product of a forward; CPU tensors need TRITON_INTERPRET=1
torch    plain torch always

A backward is plain torch under each of them.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .checks import check_choice

BACKENDS = ("auto", "triton", "torch")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_state = threading.local()


@contextmanager
def _switched(backend: str) -> Iterator[None]:
    previous = getattr(_state, "backend", None)
    _state.backend = backend
    try:
        yield
    finally:
        _state.backend = previous


def use_backend(backend: str):
    """Context manager: run the operators of this thread on "auto", "triton" or "torch"; ValueError for another name.

    A backward is plain torch under each. One that computes its forward again (activation checkpointing) does so outside
    this block or in another thread: wrap the checkpointed function itself, or set STF_KERNELS_BACKEND.
    """
    check_choice("backend", backend, BACKENDS)
    return _switched(backend)


def current_backend() -> str:
    """The innermost `use_backend` of this thread, else STF_KERNELS_BACKEND, else "auto"."""
    return getattr(_state, "backend", None) or _default_backend()


@functools.cache
def _default_backend() -> str:
    """Read at the first call that needs it, then kept."""
    backend = os.environ.get("STF_KERNELS_BACKEND") or "auto"
    check_choice("backend (STF_KERNELS_BACKEND)", backend, BACKENDS)
    return backend


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """Triton kernels run in the interpreter: TRITON_INTERPRET=1 was set before they were imported."""
    if not has_triton():
        return False
    from triton.knobs import runtime

    return bool(runtime.interpret)


@functools.cache
def triton_serves(device: torch.device) -> bool:
    """Triton compiles for this GPU: NVIDIA from compute capability 8.0, AMD CDNA and RDNA through ROCm."""
    if device.type != "cuda" or not has_triton() or interpreting():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def on_device(device: torch.device) -> AbstractContextManager:
    """A launch goes to the current device; make that the tensors' own."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def resolve(device: torch.device, dtype: torch.dtype) -> str:
    """The path for operands of one device and dtype under the current backend: "auto" only where Triton serves;
    ValueError or TypeError where "triton" was asked for and cannot be had."""
    backend = current_backend()
    if backend == "torch":
        return backend
    if backend == "auto":
        return backend if dtype in _TRITON_DTYPES and triton_serves(device) else "torch"
    if dtype not in _TRITON_DTYPES:
        raise TypeError(
            f"dtype: backend 'triton' takes float16, bfloat16 or float32, got {dtype}; use_backend('torch') takes it"
        )
    if triton_serves(device) or (interpreting() and device.type == "cpu"):
        return backend
    if not has_triton():
        raise ValueError("backend: 'triton' was asked for and triton is not installed; install it or use 'auto'")
    raise ValueError(
        f"backend: 'triton' was asked for and the tensors' device is {device}, which Triton does not serve; "
        "use 'auto', move the tensors to a GPU, or set TRITON_INTERPRET=1 before the import to interpret on the CPU"
    )
