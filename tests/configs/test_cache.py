"""If these fail, what was selected on a device is lost, or a file that is not right ends a call or decides one."""

import re
import warnings

import pytest
from torch import multiprocessing

from stf_kernels.configs import GemmConfig, tables
from stf_kernels.configs.tables import Known, Table

CONFIG = GemmConfig(128, 128, 64, 8, 8, 3)
US = {None: 80.0, CONFIG: 70.0}
KNOWN = Known(CONFIG, US)


def key(n: int = 4096) -> tuple:
    return "concat", "bfloat16", n, 8192, 768, False, False


def add(table: Table, n: int = 4096, known: Known = KNOWN) -> None:
    table.known[key(n)] = known
    table.failed[2, CONFIG] = "wrong"
    table.write()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """fresh(): the cache as a process finds it."""
    monkeypatch.setenv("STF_KERNELS_CACHE", str(tmp_path / "deep" / "folder"))
    return lambda: tables.cache_of.__wrapped__("test-gpu", "sm_90")


def test_the_folder_is_the_users(monkeypatch):
    for name, value, expected in (
        ("HOME", "/home/a", "/home/a/.cache/stf_kernels"),
        ("XDG_CACHE_HOME", "/x", "/x/stf_kernels"),
        ("STF_KERNELS_CACHE", "/s", "/s"),
    ):
        for other in ("XDG_CACHE_HOME", "STF_KERNELS_CACHE"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert str(tables.folder()) == expected


def test_what_is_written_is_there_for_the_next_process(fresh):
    add(fresh())
    add(fresh(), 1024, torchs := Known(None, US))
    add(fresh(), 4096, again := Known(CONFIG, {None: 80.0, CONFIG: 60.0}))
    found = fresh()
    assert found.known == {key(4096): again, key(1024): torchs}
    assert {known.kernel for known in found.known.values()} == {CONFIG}
    assert found.failed == {(2, CONFIG): "wrong"}
    assert {path.suffix for path in found.path.parent.iterdir()} == {".json", ".lock"}, "nothing half-written is left"
    assert re.search(r"test-gpu-torch.+-triton.+-stf_kernels.+\.json$", found.path.name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "\x00" * 40,
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: re.sub(r'"triton": "[^"]+"', '"triton": "1.0"', text),
        lambda text: text.replace('"us"', '"seconds"'),
        lambda text: text.replace("80.0", '"fast"'),
        lambda text: text.replace("80.0", "1" + "0" * 400),
        lambda text: text.replace('"concat"', '["concat"]'),
        lambda text: text.replace('"entries": [', '"entries": 7, "more": ['),
        lambda text: text.replace('"failed": [', '"failed": [3, '),
    ],
)
def test_nonsense_is_replaced_with_one_warning(fresh, damage):
    add(fresh())
    path = fresh().path
    path.write_text(damage(path.read_text()))
    with warnings.catch_warnings(record=True) as warned:
        found = fresh()
        assert not found.known
        add(found, 2048)
    [warning] = warned
    assert f"{path.name} is not used: " in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(fresh().known) == [key(2048)]


def add_fifteen(rank: int) -> None:
    warnings.simplefilter("error")
    own = tables.cache_of("test-gpu", "sm_90")
    for i in range(15):
        add(own, 1000 * rank + i)


def test_processes_that_write_at_once_lose_nothing(fresh):
    multiprocessing.spawn(add_fifteen, (), 2)
    assert {found[2] for found in fresh().known} == {first + i for first in (0, 1000) for i in range(15)}
