"""Memory between two pages that may not be touched: one element read or written outside ends the process by SIGSEGV.

flat = between_pages(elements, dtype, at_end)     the first element, or the last, is the neighbour of such a page
with Guard(seed): ...                             whatever torch makes inside lies so; what is uninitialised is NaN
"""

import ctypes
import mmap
import random

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PAGE, PROT_NONE = mmap.PAGESIZE, 0
UNINITIALISED = (torch.empty, torch.empty_like, Tensor.new_empty)
_libc = ctypes.CDLL(None, use_errno=True)


def between_pages(elements: int, dtype: torch.dtype, at_end: bool) -> Tensor:
    """[elements], all NaN where the dtype has it."""
    if not elements:
        return torch.empty(0, dtype=dtype)
    size = elements * dtype.itemsize
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + room):
        if _libc.mprotect(ctypes.c_void_p(page), PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=dtype, count=elements, offset=PAGE + (room - size if at_end else 0))
    return flat.fill_(float("nan")) if dtype.is_floating_point else flat.fill_(0)


def span(shape, strides) -> int:
    """Elements from the first to the last that a view names."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Guard(TorchFunctionMode):
    """Tensors that torch makes are moved between pages, each to one end of its room by chance; views stay views."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.ours = random.Random(seed), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if type(result) is not Tensor or not result.numel() or result.requires_grad or result.device.type != "cpu":
            return result
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        address = result.untyped_storage().data_ptr()
        if address in self.ours or any(address == t.untyped_storage().data_ptr() for t in given):
            return result
        return self.moved(result, copy=func not in UNINITIALISED)

    def moved(self, values: Tensor, *, copy: bool = True) -> Tensor:
        """The same shape, strides and, with copy, values."""
        size = span(values.shape, values.stride())
        flat = between_pages(size, values.dtype, self.random.random() < 0.5)
        self.ours.add(flat.untyped_storage().data_ptr())
        view = flat.as_strided(values.shape, values.stride())
        return view.copy_(values.resolve_neg()) if copy else view
