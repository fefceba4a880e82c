"""One thread, no network, and checkpoints that are made once for the tests that only read them."""

import pytest
import torch

from tests.convert import checkpoints as ck


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models this small run ten times slower when two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def official(tmp_path_factory):
    """A whole official checkpoint, read-only by agreement; a test that changes one makes its own."""
    return ck.make_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="package")
def converted(official, tmp_path_factory):
    """`official`, converted, with the loader for trust_remote_code."""
    from llava_integration.convert import convert_official

    dst = tmp_path_factory.mktemp("converted") / "stf"
    convert_official(official, dst, auto_map=True)
    return dst


@pytest.fixture(scope="package")
def stock(tmp_path_factory):
    """(folder, model) of a LLaVA-1.5 of transformers."""
    folder = tmp_path_factory.mktemp("stock") / "llava"
    return folder, ck.make_stock(folder)
