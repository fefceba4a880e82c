"""Launching a compiled kernel without the JIT's argument binding.

A launch through the JIT costs 31 to 70 us of host time for binding and key alone. What decides which compiled kernel
serves a call is small: dtypes, 16-byte alignment of the pointers, integers (but M), constants and options. With that
as a key, the compiled kernel is kept and launched.

Not yet run on hardware, so the default only where a table has measured it (tuning/launches.py);
STF_KERNELS_DIRECT_LAUNCH=1 turns it on, 0 off.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..backend import interpreting
from ..tuning import launches_by_default
from .compile_ahead import is_compiling_ahead

_compiled: dict[tuple, object] = {}


def enabled() -> bool:
    return not interpreting() and launches_by_default("direct", torch.cuda.current_device())


def launch(kernel, grid: tuple[int, ...], arguments: tuple, constants: Mapping[str, object], **options: int) -> None:
    """kernel[grid](*arguments, **constants, **options); arguments are the leading parameters, in order."""
    if is_compiling_ahead():
        kernel.warmup(*arguments, grid=grid, **constants, **options)
        return
    if not enabled():
        kernel[grid](*arguments, **constants, **options)
        return
    key = (
        kernel, torch.cuda.current_device(), tuple(constants.values()), tuple(options.values()),
        tuple(
            _specialisation(value, parameter.do_not_specialize)
            for value, parameter in zip(arguments, kernel.params, strict=False)
        ),
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **constants, **options)
        return
    in_order = (constants[name] for name in kernel.arg_names[len(arguments) :])
    compiled[(*grid, 1, 1)[:3]](*arguments, *in_order)


def _specialisation(value: object, do_not_specialize: bool) -> object:
    """What of an argument the compiler may have used: never less, sometimes more (every integer but M by value)."""
    if isinstance(value, Tensor):
        # ROCm's compiler also uses whether the storage lies within 2 GB
        near = torch.version.hip is None or value.untyped_storage().size() <= 2**31 - 1
        return value.dtype, value.data_ptr() % 16 == 0, near
    if isinstance(value, tuple):
        return tuple(_specialisation(item, do_not_specialize) for item in value)
    if hasattr(value, "block_shape"):  # a TensorDescriptor: its base, sizes and pitches are data
        return value.base.dtype, tuple(value.block_shape)
    return value.bit_length() > 31 if do_not_specialize else value
