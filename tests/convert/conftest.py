"""One thread, no network, checkpoints that are made once for the tests that only read them, and what a refusal is."""

import shutil

import pytest

from llava_integration.convert import ConversionError, convert_official
from tests.convert import checkpoints as ck


@pytest.fixture(scope="package")
def official(tmp_path_factory):
    """A whole official checkpoint, read-only by agreement; a test that changes one makes its own."""
    return ck.make_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="package")
def converted(official, tmp_path_factory):
    """`official`, converted, with the loader for trust_remote_code."""
    dst = tmp_path_factory.mktemp("converted") / "stf"
    convert_official(official, dst, auto_map=True)
    return dst


@pytest.fixture(scope="package")
def stock(tmp_path_factory):
    """(folder, model) of a LLaVA-1.5 of transformers."""
    folder = tmp_path_factory.mktemp("stock") / "llava"
    return folder, ck.make_stock(folder)


@pytest.fixture
def src(official, tmp_path):
    """A copy of `official` and its tower, for a test to damage."""
    for folder in ("official", "tower"):
        shutil.copytree(official.parent / folder, tmp_path / folder)
    return tmp_path / "official"


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "stf"


@pytest.fixture
def refused():
    """Converts what must end in one line that names what is wrong, nothing at DST or beside it, and SRC as it was."""

    def check(match, src, dst, convert=convert_official, **options):
        before = ck.snapshot(src) if src.is_dir() else {}
        beside = set(dst.parent.iterdir())
        with pytest.raises(ConversionError, match=match) as caught:
            convert(src, dst, **options)
        assert "\n" not in str(caught.value)
        assert set(dst.parent.iterdir()) == beside, "nothing at DST, nothing beside it"
        assert not src.is_dir() or ck.snapshot(src) == before

    return check
