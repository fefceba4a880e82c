"""Which path computes: Triton kernels or plain torch.

    auto     Triton for tensors on a GPU that Triton serves, plain torch elsewhere; where the device's tuning
             table names cuBLAS for a shape, plain torch for that shape
    triton   Triton always; CPU tensors need TRITON_INTERPRET=1
    torch    plain torch always

The environment variable STF_KERNELS_BACKEND is the default of `use_backend`.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .checks import check_choice

BACKENDS = ("auto", "triton", "torch")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_state = threading.local()


def _validated(name: object, source: str) -> str:
    check_choice(source, name, BACKENDS)
    return name


@contextmanager
def _switched(backend: str) -> Iterator[None]:
    previous = getattr(_state, "backend", None)
    _state.backend = backend
    try:
        yield
    finally:
        _state.backend = previous


def use_backend(backend: str):
    """Context manager: run the operators of this thread on "auto", "triton" or "torch".

    A backward takes the path of its forward, wherever it is called. Not one that torch.compile made: on a GPU autograd
    runs it in a thread of its own, where STF_KERNELS_BACKEND decides.

    Raises ValueError for another name, at once rather than on entry.
    """
    return _switched(_validated(backend, "backend"))


def current_backend() -> str:
    """The innermost `use_backend` of this thread, else STF_KERNELS_BACKEND, else "auto"."""
    backend = getattr(_state, "backend", None)
    if backend is None:
        backend = _validated(os.environ.get("STF_KERNELS_BACKEND") or "auto", "backend (STF_KERNELS_BACKEND)")
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


def use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Decide the path for operands of one device and dtype; ValueError or TypeError where "triton" cannot be had."""
    backend = current_backend()
    if backend == "torch":
        return False
    if backend == "auto":
        return dtype in _TRITON_DTYPES and triton_serves(device)
    if dtype not in _TRITON_DTYPES:
        raise TypeError(
            f"dtype: backend 'triton' takes float16, bfloat16 or float32, got {dtype}; use_backend('torch') takes it"
        )
    if triton_serves(device) or (interpreting() and device.type == "cpu"):
        return True
    if not has_triton():
        raise ValueError("backend: 'triton' was asked for and triton is not installed; install it or use 'auto'")
    raise ValueError(
        f"backend: 'triton' was asked for and the tensors' device is {device}, which Triton does not serve; "
        "use 'auto', move the tensors to a GPU, or set TRITON_INTERPRET=1 before the import to interpret on the CPU"
    )
