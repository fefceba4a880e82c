"""Broken if this fails: a file of a checkpoint, a table or a cache that somebody damaged or made up ends in an error of
the library underneath, is executed, or is answered outside DST.

Bytes are changed, cut and moved; in JSON any value becomes any other, as deep, long or odd as JSON allows. STF_HOSTILE
says how many of each are drawn; `make fuzz` draws 500.
"""

import contextlib
import json
import os
import random
import shutil
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_integration.convert import ConversionError, convert_llava, convert_official
from stf_kernels.configs import tables
from tests.configs.test_tables import entry, table
from tests.convert import checkpoints as ck

DRAWN = settings(
    max_examples=int(os.environ.get("STF_HOSTILE", 20)), deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
DEEP = "[" * 20_000 + "]" * 20_000
ODD = [None, True, -1, 0, 2**63, 2**70, 1e308, float("nan"), "", "../../x", "/etc/passwd", "\x00", "\ud800", [], {},
       [[]], {"": None}, "x" * 5000, [0] * 3000, "os.system('touch executed')"]  # fmt: skip


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed(text, where, to):
    """JSON with one value in place of another."""
    value = json.loads(text)
    path = list(places(value))[where % len(list(places(value)))]
    if not path:
        return json.dumps(to)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = to
    return json.dumps(value)


def damaged(data, seed):
    """Bytes changed, cut, moved or repeated."""
    draw = random.Random(seed)
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(5)
    if kind == 0:
        out = bytearray(data)
        for _ in range(draw.randrange(1, 9)):
            out[draw.choice([draw.randrange(len(data)), draw.randrange(min(400, len(data)))])] = draw.randrange(256)
        return bytes(out)
    return [data[:at], data[end:] + data[:end], data[:end] + data[at:], data[:8] + b"\xff" * 8 + data[16:]][kind - 1]


def tried(convert, src, dst):
    """Whole or not at all, a sentence or a folder, nothing beside it, SRC as it was."""
    before, beside = ck.snapshot(src), set(dst.parent.iterdir())
    with contextlib.suppress(ConversionError):
        convert(src, dst)
    made = {dst} if dst.exists() else set()
    assert set(dst.parent.iterdir()) == beside | made
    assert ck.snapshot(src) == before
    if made:
        shutil.rmtree(dst)


@pytest.fixture(params=["llava", "safetensors", "bin"])
def source(request, tmp_path):
    """(what converts it, its folder): a LLaVA of transformers, or an official one in two files."""
    if request.param == "llava":
        ck.make_stock(tmp_path / "llava")
        return convert_llava, tmp_path / "llava"
    return convert_official, ck.make_official(tmp_path, 2, request.param)


@DRAWN
@given(st.data())
def test_files_of_a_checkpoint(source, dst, data):
    convert, folder = source
    files = sorted(file for file in folder.iterdir() if file.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        content = changed(whole, data.draw(st.integers(0, 999)), data.draw(st.sampled_from(ODD))).encode()
    else:
        content = damaged(whole, data.draw(st.integers(0, 10**6)))
    file.write_bytes(content)
    try:
        tried(convert, folder, dst)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_json_deeper_than_python_goes(source, dst, file):
    convert, folder = source
    (folder / file).write_text(DEEP)
    with pytest.raises(ConversionError):
        convert(folder, dst)
    assert not dst.exists()


def only_warns(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    assert all(str(warning.message).startswith("stf_kernels: ") for warning in said)


@DRAWN
@given(st.integers(0, 999), st.sampled_from([*ODD, "deep"]), st.integers(0, 10**6), st.booleans())
def test_tables_and_caches(tmp_path, where, odd, seed, by_bytes):
    path, text = tmp_path / "table.json", table(entry())
    if by_bytes:
        path.write_bytes(damaged(text.encode(), seed))
    else:
        path.write_text(DEEP if odd == "deep" else changed(text, where, odd))
    only_warns(tables.Table(path, "test-gpu", "sm_90").read)
