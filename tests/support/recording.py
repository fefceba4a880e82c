"""What torch was asked to do: every aten call with the tensors that came out of it."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Context: `calls` counts operators by name; `made` holds (name, shape, dtype) of tensors that own new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.made: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.made.append((name, tuple(tensor.shape), tensor.dtype))
        return result

    def matrix_products(self) -> int:
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"))

    def largest(self) -> int:
        """Elements of the largest new tensor."""
        return max((torch.Size(shape).numel() for _, shape, _ in self.made), default=0)
