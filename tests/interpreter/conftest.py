"""Every test here runs the Triton kernels, interpreted, with poisoned memory."""

import warnings

import pytest

import stf_kernels
from stf_kernels.backend import interpreting


@pytest.fixture(autouse=True)
def _interpreted(poison):
    assert interpreting(), "run as TRITON_INTERPRET=1 python -m pytest tests/interpreter"
    with stf_kernels.use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy tells of overflows that a GPU does not
        yield
