"""The numerical rule, in one place:  |ours - exact| <= 2 * |torch in the same dtype - exact| + 1e-6,  maxima.

"exact" is `reference` in float64 on the same (rounded) operands, "torch in the same dtype" is `reference` itself.

A GPU's library may share a sum out over K and be several times as exact in fp32 as any kernel that adds it up in one
go. There "torch in fp32" is no less than what such a sum rounds to.
"""

import torch
from torch import Tensor

# Of 16384 products, the longest sum here, in units of the results' root mean square: 2.3e-6 itself in the root mean
# square, 1.9e-5 at the most of 40,000 sums of random numbers. Twice this is allowed.
ONE_SUM = 1.5e-5


def max_error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact.double()).abs().max().item() if exact.numel() else 0.0


def assert_within_rule(name: str, found: Tensor | None, same_dtype: Tensor | None, exact: Tensor | None) -> None:
    """found obeys the rule, and has the shape and dtype of torch's own result; None only where torch has none."""
    if exact is None:
        assert found is None, f"{name}: torch has no gradient here, got one"
        return
    assert found is not None, f"{name}: nothing came back"
    assert found.shape == exact.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    assert found.dtype == same_dtype.dtype, f"{name}: {found.dtype}, expected {same_dtype.dtype}"
    assert bool(torch.isfinite(found).all()), f"{name}: not finite (an element that nobody wrote?)"
    error, torchs = max_error(found, exact), error_of_torch(same_dtype, exact, on_gpu=found.is_cuda)
    assert error <= 2 * torchs + 1e-6, f"{name}: error {error:.3g}, torch in {found.dtype} has {torchs:.3g}"


def error_of_torch(same_dtype: Tensor, exact: Tensor, *, on_gpu: bool) -> float:
    """As the rule takes it."""
    error = max_error(same_dtype, exact)
    if on_gpu and same_dtype.dtype == torch.float32 and exact.numel():
        return max(error, ONE_SUM * exact.double().square().mean().sqrt().item())
    return error
