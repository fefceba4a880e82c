"""If this fails, an offset beyond 2^31 elements wraps: the wrong memory is read, or written.

The memory is sparse: 8 GB of address space, of which a few pages are touched.
"""

import pytest
import torch

from stf_kernels.configs import GemmConfig
from stf_kernels.ops import launch
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

CONFIG = GemmConfig(16, 16, 16)
FAR = 2**31 + 2**10  # elements
C, N = 16, 20


def small(batch, tokens):
    return torch.randn(batch, tokens, C).half(), torch.randn(N, C).half() / 4


def product(x, weight):
    return (x.float() @ weight.float().t()).half()


@pytest.mark.parametrize("strides", [(FAR, C, 1), (C, FAR, 1)], ids=["image", "token"])
def test_rows_are_read_there(far_apart, strides):
    x, weight = small(2, 2)
    view = far_apart(x.shape, strides).copy_(x)
    torch.testing.assert_close(run_stage([view], weight, None, Stage(), CONFIG)[0], product(x, weight))
    twice, _ = run_stage([x, view], torch.cat([weight, weight], 1), None, Stage(), CONFIG)  # strides of its own
    torch.testing.assert_close(twice, product(2 * x, weight))


def test_windows_are_read_there(far_apart):
    """A merge multiplies the grid's width by the token stride: dy * W * stride."""
    x, weight = torch.randn(1, 4, C).half(), torch.randn(N, 4 * C).half() / 8
    view = far_apart(x.shape, (1, FAR // 3 + 16, 1)).copy_(x)
    y, _ = run_stage([view], weight, None, Stage(merge_in=2, grid=(2, 2)), CONFIG)
    torch.testing.assert_close(y, product(x.view(1, 1, -1), weight))


def test_weights_are_read_there(far_apart):
    x, weight = small(1, 3)
    view = far_apart(weight.shape, (FAR // (N - 1), 1)).copy_(weight)
    torch.testing.assert_close(run_stage([x], view, None, Stage(), CONFIG)[0], product(x, weight))


def test_rows_are_written_there(far_apart, monkeypatch):
    """Under the interpreter a 16-bit `out` is copied to fp32 whole; told otherwise, the kernel writes to it."""
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    x, weight = small(1, 4)
    out = far_apart((3, N), (FAR // 2, 1))
    run_stage([x], weight, None, Stage(), CONFIG, out=out, rows=torch.tensor([2, 0, 1, 7]))
    torch.testing.assert_close(out[[2, 0, 1]], product(x, weight)[0, :3], rtol=2e-3, atol=2e-3)
