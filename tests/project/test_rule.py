"""If this fails, the numerical rule blames a GPU's kernel for the library's better sums, or lets a wrong one pass."""

import torch
from support.rule import error_of_torch, max_error

K, COUNT, SPLITS = 16384, 512, 16


def test_a_library_that_splits_k_does_not_make_one_long_sum_wrong():
    a, b = torch.randn(2, K, COUNT)
    b /= K**0.5
    exact = (a.double() * b.double()).sum(0)

    def summed(first: int, last: int) -> torch.Tensor:
        total = torch.zeros(COUNT)
        for k in range(first, last):
            total = torch.addcmul(total, a[k], b[k])
        return total

    share = K // SPLITS
    library = sum(summed(i * share, (i + 1) * share) for i in range(SPLITS))
    ours = max_error(summed(0, K), exact)
    assert ours > 2 * max_error(library, exact) + 1e-6, "or nothing is told apart here"
    allowed = 2 * error_of_torch(library, exact, on_gpu=True) + 1e-6
    assert ours <= allowed
    assert 2 * error_of_torch(library, exact, on_gpu=False) + 1e-6 < ours, "a CPU's library adds up as we do"
    tf32 = (a.view(torch.int32) & ~0x1FFF).view(torch.float32)  # operands of 10 bits
    missing = (a[:-32] * b[:-32]).double().sum(0)  # a K step too few
    assert max_error((tf32.double() * b.double()).sum(0), exact) > 5 * allowed
    assert max_error(missing, exact) > 5 * allowed
