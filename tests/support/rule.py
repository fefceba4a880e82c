"""The numerical rule, in one place:  |ours - exact| <= 2 * |torch in the same dtype - exact| + 1e-6,  maxima.

"exact" is `reference` in float64 on the same (rounded) operands, "torch in the same dtype" is `reference` itself.
"""

import torch
from torch import Tensor


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
    error, torchs = max_error(found, exact), max_error(same_dtype, exact)
    assert error <= 2 * torchs + 1e-6, f"{name}: error {error:.3g}, torch in {found.dtype} has {torchs:.3g}"
