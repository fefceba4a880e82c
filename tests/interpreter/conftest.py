"""Every test here runs the Triton kernels, interpreted."""

import mmap
import warnings

import pytest
import torch

import stf_kernels
from stf_kernels.backend import interpreting


@pytest.fixture(autouse=True)
def _interpreted():
    assert interpreting(), "run as TRITON_INTERPRET=1 python -m pytest tests/interpreter"
    with stf_kernels.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy tells of overflows that a GPU does not
        yield


@pytest.fixture(scope="session")
def far_apart():
    """strided(shape, strides): fp16 zeros with 2^31 elements before and behind; only pages that are touched exist."""
    size = 2**31 + 2**20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.12 on
    whole = torch.frombuffer(mmap.mmap(-1, 2 * (2 * size + 2**20), flags=flags), dtype=torch.float16)
    return lambda shape, strides: whole.as_strided(shape, strides, size)
