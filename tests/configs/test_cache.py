"""If these fail, what was selected on a device is lost, or a file that is not right ends a call or decides one."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
from support.processes import ROOT, clean_environment

from stf_kernels.configs import GemmConfig, cache

CONFIG = GemmConfig(128, 128, 64, 8, 8, 3)


def entry(n: int = 4096, **changes) -> dict:
    timed = [{"config": None, "us": 80.0}, {"config": CONFIG.to_dict(), "us": 70.0}]
    return {
        "stage": "concat", "dtype": "bfloat16", "n": n, "k": 8192, "m_max": 768, "provider": "triton",
        "config": CONFIG.to_dict(), "us": 70.0, "rival": "torch", "rival_us": 80.0,
        "m": 576, "save_pre": False, "tf32": False, "candidates": timed, **changes,
    }  # fmt: skip


FAILED = {"stage": "linear", "dtype": "bfloat16", "config": CONFIG.to_dict(), "reason": "wrong"}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """fresh(): the cache as a process finds it."""
    monkeypatch.setenv("STF_KERNELS_CACHE", str(tmp_path / "deep" / "folder"))

    def fresh() -> cache.Cache:
        found = cache.Cache("test-gpu", "sm_90")
        found.read()
        return found

    return fresh


def test_the_folder_is_the_users(monkeypatch):
    for name, value, expected in (
        ("HOME", "/home/a", "/home/a/.cache/stf_kernels"),
        ("XDG_CACHE_HOME", "/x", "/x/stf_kernels"),
        ("STF_KERNELS_CACHE", "/s", "/s"),
    ):
        for other in ("XDG_CACHE_HOME", "STF_KERNELS_CACHE"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert str(cache.folder()) == expected


def test_what_is_added_is_there_for_the_next_process(fresh):
    fresh().add([entry(), entry(n=1024, provider="torch", config=None)], [FAILED])
    fresh().add([entry(us=60.0)], [])
    found = fresh()
    assert sorted((known.record["n"], known.record["us"]) for known in found.known.values()) == [(1024, 70), (4096, 60)]
    assert {known.config for known in found.known.values()} == {None, CONFIG}
    assert {known.kernel for known in found.known.values()} == {CONFIG}
    assert list(found.failed) == [(2, False, CONFIG)]
    assert {path.suffix for path in found.path.parent.iterdir()} == {".json", ".lock"}, "nothing half-written is left"
    assert re.search(r"test-gpu-torch.+-triton.+-stf_kernels.+\.json$", found.path.name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "\x00" * 40,
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("sm_90", "sm_80"),
        lambda text: re.sub(r'"triton": "[^"]+"', '"triton": "1.0"', text),
        lambda text: text.replace('"block_m": 128', '"block_m": 100'),
        lambda text: text.replace('"num_warps": 8', '"num_warps": "many"'),
        lambda text: text.replace('"num_stages": 3', '"num_stages": 9'),
        lambda text: text.replace('"us"', '"seconds"'),
        lambda text: text.replace("80.0", '"fast"'),
        lambda text: text.replace("80.0", "1" + "0" * 400),
        lambda text: text.replace('"concat"', '["concat"]'),
        lambda text: text.replace('"entries": [', '"entries": 7, "more": ['),
        lambda text: text.replace('"failed": [', '"failed": [3, '),
        lambda text: text.replace('"config": {', '"config": {"colour": 1, '),
    ],
)
def test_nonsense_is_replaced_with_one_warning(fresh, damage):
    fresh().add([entry()], [FAILED])
    path = fresh().path
    path.write_text(damage(path.read_text()))
    with warnings.catch_warnings(record=True) as warned:
        found = fresh()
        assert not found.known
        found.add([entry(n=2048)], [])
    [warning] = warned
    assert f"{path.name} is not used, and is replaced" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [known.record["n"] for known in fresh().known.values()] == [2048]


def test_cut_at_every_place(fresh):
    fresh().add([entry()], [FAILED])
    path = fresh().path
    text = path.read_text()
    for end in range(0, len(text) - 2, 29):
        path.write_text(text[:end])
        with pytest.warns(UserWarning, match="is not used"):
            assert not fresh().known


@pytest.mark.parametrize("how", ["a file in the way", "locked"])
def test_where_nothing_can_be_written_it_serves_its_process(fresh, how, monkeypatch, tmp_path):
    found = fresh()
    if how == "locked":
        import fcntl

        found.path.parent.mkdir(parents=True)
        other = open(found.path.with_suffix(".lock"), "w")  # noqa: SIM115
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.1)
    else:
        (tmp_path / "deep").write_text("")
    with warnings.catch_warnings(record=True) as warned:
        found.add([entry()], [])
        found.add([entry(n=1024)], [])
    [warning] = warned
    assert "cannot be written, so what is selected serves this process alone" in str(warning.message)
    assert len(found.known) == 2


def test_processes_that_write_at_once_lose_nothing(fresh):
    code = (
        "import sys; from stf_kernels.configs import cache; from test_cache import entry\n"
        "own = cache.Cache('test-gpu', 'sm_90')\n"
        "for i in range(15): own.add([entry(n=int(sys.argv[1]) + i)], [])"
    )
    environment = clean_environment(PYTHONPATH=os.pathsep.join([str(ROOT), f"{ROOT}/tests", f"{ROOT}/tests/configs"]))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", code, str(first)], cwd=ROOT, env=environment
        )
        for first in (1000, 2000)
    ]
    assert [process.wait(100) for process in started] == [0, 0]
    names = {known.record["n"] for known in fresh().known.values()}
    assert names == {first + i for first in (1000, 2000) for i in range(15)}
    assert json.loads(fresh().path.read_text())["device"] == "test-gpu"
