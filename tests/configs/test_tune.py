"""If these fail, the offline search tries what cannot run, leaves out what is worth trying, times something else than
what its table will say, or forgets it."""

import functools

import pytest
import torch

from stf_kernels import backend, configs
from stf_kernels.configs import SHARED_MEMORY_LIMIT, Gemm, GemmConfig, selection, tables
from stf_kernels.configs.model import every_tile
from stf_kernels.ops import first_use
from stf_kernels.tune import __main__ as tune

HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.fixture
def found(pretend, monkeypatch):
    """found(stage, m, n, k): what the search tries for a product."""
    monkeypatch.setattr(selection, "search", selection.Search(every_tile, GemmConfig.tile, 2, 1000))

    def found(stage: str, m: int, n: int, k: int, dtype=HALF, arch="sm_90") -> list[GemmConfig]:
        pretend(arch)
        return selection.contenders(0, Gemm(stage, dtype, m, n, k))

    return found


def test_few_rows_put_split_k_first_and_many_rows_do_not(found):
    few, many = (found("linear_merge", m, 1024, 4096, arch="sm_80")[0] for m in (144, 36_864))
    assert few.split_k > 1
    assert many.split_k == 1
    assert many.block_m * many.block_n >= 128 * 128


@pytest.mark.parametrize(
    ("stage", "arch", "dtype", "forms"),
    [
        ("linear", "sm_90", HALF, {"pointer", "tma", "swap_ab"}),
        ("concat", "sm_90", HALF, {"pointer", "tma"}),
        ("merge", "sm_90", HALF, {"pointer"}),
        ("linear", "sm_100", HALF, {"pointer", "tma", "swap_ab"}),
        ("linear", "sm_120", HALF, {"pointer"}),
        ("linear", "gfx942", HALF, {"pointer"}),
        ("linear", "sm_90", FLOAT, {"pointer"}),
        ("linear", "sm_89", FLOAT, {"pointer"}),
    ],
)
def test_forms_are_tried_where_they_run_and_fit(found, stage, arch, dtype, forms):
    tried = found(stage, 144, 4096, 4096, dtype, arch)
    assert len(tried) == len(set(tried)) > 20
    assert max(config.shared_bytes(dtype.itemsize) for config in tried) <= SHARED_MEMORY_LIMIT[arch]
    assert {config.form for config in tried} == forms
    assert any(config.split_k > 1 for config in tried) == (arch != "gfx942")


def test_one_image_puts_the_swapped_form_first(found):
    """144 rows are 128 + 16 there, and two tiles of 128 elsewhere."""
    tried = found("linear", 144, 16384, 4096)
    assert (tried[0].form, tried[0].rows) == ("swap_ab", 144)
    assert {config.form for config in tried[:24]} >= {"swap_ab", "tma"}


def test_times_are_taken_in_turns_on_a_cold_cache(monkeypatch):
    """A simulated clock: each call takes its time, ten times that on a cache that was not flushed before it."""
    now, order, rounds = [0.0], [], {}

    class Event:
        reached = -1.0

        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now[0]

        def synchronize(self):
            Event.reached = self.at

        def elapsed_time(self, end):
            assert end.at <= Event.reached, "it has not come yet"
            return 1e-3 * (end.at - self.at)

    def flush():
        order.append("flush")
        now[0] += 1000.0

    def call(name, us):
        now[0] += us if order[-1] == "flush" else 10 * us
        order.append(name)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(first_use, "Flush", lambda device: flush)
    monkeypatch.setattr(first_use.time, "monotonic", lambda: 1e-6 * now[0])
    for us in (1.0, 1e6):
        times = [us * (i + 1) for i in range(3)]
        order.clear()
        found = first_use.medians(
            [functools.partial(call, *pair) for pair in enumerate(times)], torch.device("cpu"), 12
        )
        assert found == pytest.approx(times)
        ran = [name for name in order if name != "flush"]
        assert {ran[3 * turn] for turn in range(1, len(ran) // 3)} == {0, 1, 2}, "each is first at times"
        rounds[us] = len(ran) // 3 - 1
    assert rounds == {1.0: 12, 1e6: 3}


@pytest.fixture
def device(gpu, monkeypatch, tmp_path):
    """One on which the command tunes a small projector."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "triton_serves", lambda device: True)
    monkeypatch.setattr(configs, "device_identity", lambda index: ("test-gpu", "sm_90"))
    monkeypatch.setattr(tune, "PLACE", "cpu")
    monkeypatch.setattr(tune, "SIZES", {"dim": 16, "out_dim": 24})
    monkeypatch.setattr(tables, "_FOLDER", tmp_path)
    monkeypatch.setattr(selection, "search", selection.search)
    return gpu


def test_the_table_says_what_is_fastest_and_is_gone_on_with(device, capsys):
    device.us[None] = 101.0  # of plain torch, where a kernel takes 90
    assert tune.main(["--batch", "1", "--most", "4"]) == 0
    selections = device.selections
    table = tables.table_of.__wrapped__("test-gpu", "sm_90")
    products = {(key[0], key[4], key[5]) for key in table.known}
    assert products == {
        (stage, m, training)
        for stage, m, training in (
            ("concat", 768, False), ("linear_merge", 768, False), ("linear", 192, False), ("merge", 192, False),
            ("concat", 768, True), ("linear", 192, True), ("merge", 192, True),
        )
    }  # fmt: skip
    for known in table.known.values():
        assert len(known.us) == 5, "plain torch and the four most promising"
        assert known.us[known.config] == 90.0
    tune.main(["--batch", "1"])
    assert device.selections == selections, "nothing is measured again"
    with pytest.warns(UserWarning, match="test-gpu.json is not used: made_with"):
        tune.main(["--batch", "2", "--commit", "another", "--most", "1"])
    assert "entries in" in capsys.readouterr().out
    mixed = tables.table_of.__wrapped__("test-gpu", "sm_90").known
    assert not mixed.keys() & table.known.keys(), "two commits are not mixed"


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (([], "no GPU"), (["--batch", "0"], "at least 1")):
        with pytest.raises(SystemExit, match="2"):
            tune.main(arguments)
        assert words in capsys.readouterr().err
