"""If these fail, the offline search forgets what it measured, or writes a wrong table."""

import json
import os

import pytest
import torch

from stf_kernels.tune.problems import PROBLEMS
from stf_kernels.configs import GemmConfig, search
from stf_kernels.tune.__main__ import main
from stf_kernels.tuning.launch_bench import LaunchBench
from stf_kernels.tuning.lookup import parse_table
from stf_kernels.tune.search import Journal, Key, entry_for, write_table

HEADER = {"device": "Test GPU", "arch": "sm_90", "commit": "x", "torch": "2", "triton": "3"}
CONCAT = PROBLEMS["concat"]


class Clock:
    """A fake GPU: a time for every configuration, and a count of what was really measured."""

    def __init__(self, times: dict[GemmConfig | None, float | None]) -> None:
        self.times, self.calls = times, 0

    def __call__(self, config: GemmConfig | None) -> float | None:
        self.calls += 1
        return self.times[config]


FAST, SLOW, BROKEN = GemmConfig(128, 128, 64), GemmConfig(64, 64, 64), GemmConfig(256, 128, 64)
KEY = Key("concat", "bfloat16", 576)


@pytest.mark.parametrize(("cublas", "provider", "us"), [(100.0, "triton", 90.0), (50.0, "cublas", 50.0)])
def test_the_entry_is_the_fastest_with_its_justification(tmp_path, cublas, provider, us):
    clock = Clock({None: cublas, FAST: 90.0, SLOW: 120.0, BROKEN: None})
    entry = entry_for(CONCAT, KEY, [SLOW, BROKEN, FAST], clock, Journal(tmp_path / "j", HEADER))
    assert (entry["provider"], entry["us"]) == (provider, us)
    assert entry["config"] == (FAST.to_dict() if provider == "triton" else None)
    assert entry["rival_us"] == (cublas if provider == "triton" else 90.0)
    write_table(tmp_path / "t.json", HEADER, [entry])
    parsed = parse_table((tmp_path / "t.json").read_text(), "sm_90")
    assert parsed["concat", "bfloat16", 4096, 8192] == [(576, FAST if provider == "triton" else None)]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "journal.jsonl"
    clock = Clock({None: 100.0, FAST: 90.0, SLOW: 120.0, BROKEN: None})
    first = entry_for(CONCAT, KEY, [FAST, BROKEN], clock, Journal(path, HEADER))
    assert clock.calls == 3
    path.write_text(path.read_text() + '\n{"problem": "conc')  # the process died while writing
    again = entry_for(CONCAT, KEY, [FAST, BROKEN, SLOW], clock, Journal(path, HEADER))
    assert clock.calls == 4, "only the new configuration is measured"
    assert again == first
    assert entry_for(CONCAT, KEY, [SLOW], clock, Journal(path, HEADER))["us"] == 100.0
    assert clock.calls == 4, "what followed the broken line was kept"


@pytest.mark.parametrize("line", ["12", "[]", "null", '{"problem": "concat"}', '{"problem": 1, "dtype": 2, "m": 3, '
                                  '"config": 7, "us": 1}', "\x00\ufffd"])  # fmt: skip
def test_what_is_no_measurement_is_passed_over(tmp_path, line):
    path = tmp_path / "j"
    clock = Clock({None: 100.0, FAST: 90.0})
    entry_for(CONCAT, KEY, [FAST], clock, Journal(path, HEADER))
    path.write_text(path.read_text() + "\n" + line)
    entry_for(CONCAT, KEY, [FAST], clock, Journal(path, HEADER))
    assert clock.calls == 2


def test_a_journal_whose_beginning_is_lost_is_refused(tmp_path):
    (tmp_path / "j").write_text('{"device": "Te')
    with pytest.raises(ValueError, match=r"--journal: .*name another"):
        Journal(tmp_path / "j", HEADER)


def test_a_second_search_keeps_what_the_first_found(tmp_path):
    """`--dtype float16` after bfloat16, or one batch again: the rest of the table stays."""
    path, clock = tmp_path / "t.json", Clock({None: 100.0, FAST: 90.0})
    first, second, again = (
        entry_for(CONCAT, Key("concat", dtype, m), [FAST], clock, Journal(tmp_path / name, HEADER))
        for dtype, m, name in (("bfloat16", 576, "a"), ("float16", 576, "a"), ("bfloat16", 576, "b"))
    )
    again["us"] = 80.0
    entries = search.entries_of(path, HEADER)
    for entry in (first, second, again):
        entries = search.with_entry(entries, entry)
        write_table(path, HEADER, entries)
        assert search.entries_of(path, HEADER) == entries
    assert entries == [second, again]


class Launches(LaunchBench):
    """A chain whose result and times depend on the variable alone."""

    def __init__(self, other_bits=False):
        self.other_bits = other_bits

    def _chain(self):
        on = os.environ["STF_KERNELS_PDL"] == "1"
        return torch.full((2,), 2.0 if on and self.other_bits else 1.0)

    def _captured(self):
        return 185.0 if os.environ["STF_KERNELS_PDL"] == "1" else 190.0


def test_a_way_to_launch_is_measured_with_and_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("STF_KERNELS_PDL", "1")
    times = Launches().measure("pdl")
    assert times == {"us": 185.0, "rival_us": 190.0}
    assert os.environ["STF_KERNELS_PDL"] == "1", "the user's own choice is put back"
    write_table(tmp_path / "t.json", HEADER, [], {"pdl": times})
    parse_table((tmp_path / "t.json").read_text(), "sm_90")
    assert search.entries_of(tmp_path / "t.json", HEADER) == []
    with pytest.raises(RuntimeError, match=r"launches\.pdl.*other bits"):
        Launches(other_bits=True).measure("pdl")


def test_a_table_of_other_versions_is_begun_anew(tmp_path, capsys):
    path, clock = tmp_path / "t.json", Clock({None: 100.0, FAST: 90.0})
    write_table(path, HEADER, [entry_for(CONCAT, KEY, [FAST], clock, Journal(tmp_path / "a", HEADER))])
    assert search.entries_of(path, {**HEADER, "triton": "9"}) == []
    assert "other versions" in capsys.readouterr().out
    path.write_text("{")
    assert search.entries_of(path, HEADER) == []
    assert "will be replaced" in capsys.readouterr().out


def test_a_journal_of_another_device_is_refused(tmp_path):
    Journal(tmp_path / "j", HEADER)
    with pytest.raises(ValueError, match="--journal"):
        Journal(tmp_path / "j", {**HEADER, "device": "Other"})


def test_nothing_runs_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="none of 1"):
        entry_for(CONCAT, KEY, [BROKEN], Clock({None: 1.0, BROKEN: None}), Journal(tmp_path / "j", HEADER))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_problems_name_stages_that_tables_know():
    from stf_kernels.tuning.lookup import STAGES

    assert {p.kind for p in PROBLEMS.values()} == set(STAGES)
    assert json.dumps([p.k for p in PROBLEMS.values()]).startswith("[8192, 4096, 4096, 4096, 16384")
