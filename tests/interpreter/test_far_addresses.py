"""If this fails, an offset beyond 2^31 elements wraps: the wrong memory is read, or written.

The buffers are sparse: 4 GB of address space, of which a few pages are touched.
"""

import mmap

import pytest
import torch

from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage
from stf_kernels.configs import GemmConfig

CONFIG = GemmConfig(16, 16, 16)
FAR = 2**31 + 2**20  # elements
C, N = 16, 20


@pytest.fixture
def far():
    """fp16 memory of more than 2^31 elements, zero until touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.12 on
    memory = mmap.mmap(-1, 2 * (FAR + 2**20), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16)


def small(batch, tokens):
    return torch.randn(batch, tokens, C).half(), torch.randn(N, C).half() / 4


def expected(x, weight):
    return (x.float() @ weight.float().t()).half()


@pytest.mark.parametrize("axis", ["batch", "token"])
def test_rows_are_read_there(far, axis):
    x, weight = small(2, 2)
    strides = (FAR, C, 1) if axis == "batch" else (C, FAR, 1)
    view = far.as_strided(x.shape, strides)
    view.copy_(x)
    y, _ = run_stage([view], weight, None, Stage(), CONFIG)
    torch.testing.assert_close(y, expected(x, weight))


def test_windows_are_read_there(far):
    """A merge multiplies the grid's width by the token stride: dy * W * stride."""
    x, _ = small(1, 4)
    weight = torch.randn(N, 4 * C).half() / 8
    view = far.as_strided(x.shape, (1, FAR // 3 + 16, 1))
    view.copy_(x)
    y, _ = run_stage([view], weight, None, Stage(merge_in=2, grid=(2, 2)), CONFIG)
    torch.testing.assert_close(y, (x.float().view(1, 1, -1) @ weight.float().t()).half())


def test_weights_are_read_there(far):
    x, weight = small(1, 3)
    view = far.as_strided(weight.shape, (FAR // (N - 1), 1))
    view.copy_(weight)
    y, _ = run_stage([x], view, None, Stage(), CONFIG)
    torch.testing.assert_close(y, expected(x, weight))


def test_blocks_of_unlike_strides(far):
    x, weight = small(2, 2)
    view = far.as_strided(x.shape, (FAR, C, 1))
    view.copy_(x)
    both = torch.cat([weight, weight], 1)
    y, _ = run_stage([x, view], both, None, Stage(), CONFIG)
    torch.testing.assert_close(y, (2 * (x.float() @ weight.float().t())).half())


def test_rows_are_written_there(far, monkeypatch):
    """Under the interpreter a 16-bit `out` is copied to fp32 whole; told otherwise, the kernel writes to it."""
    from stf_kernels.ops import forms, launch

    def direct(kernel, grid, arguments, constants, **options):
        kernel[grid](*arguments, **constants, **options)

    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(forms, "launch", direct)
    x, weight = small(1, 4)
    out = far.as_strided((3, N), (FAR // 2, 1))
    run_stage([x], weight, None, Stage(), CONFIG, out=out, rows=torch.tensor([2, 0, 1, 7]))
    torch.testing.assert_close(out[[2, 0, 1]], expected(x, weight)[0, :3], rtol=2e-3, atol=2e-3)
