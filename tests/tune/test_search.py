"""If these fail, the offline search forgets what it measured, or writes a wrong table."""

import pytest
import torch

from stf_kernels.configs import GemmConfig
from stf_kernels.configs.tables import STAGES, parse_table
from stf_kernels.tune import search
from stf_kernels.tune.__main__ import main
from stf_kernels.tune.problems import PROBLEMS
from stf_kernels.tune.search import Journal, Key, entry_for, write_table

HEADER = {"device": "Test GPU", "arch": "sm_90", "commit": "x", "torch": "2", "triton": "3"}
CONCAT, KEY = PROBLEMS["concat"], Key("concat", "bfloat16", 576)
FAST, SLOW, BROKEN = GemmConfig(128, 128, 64), GemmConfig(64, 64, 64), GemmConfig(256, 128, 64)


class Clock:
    """A fake GPU: a time for every configuration, and a count of what was really measured."""

    def __init__(self, torchs: float = 100.0) -> None:
        self.times, self.calls = {None: torchs, FAST: 90.0, SLOW: 120.0, BROKEN: None}, 0

    def __call__(self, config: GemmConfig | None) -> float | None:
        self.calls += 1
        return self.times[config]


@pytest.mark.parametrize(("torchs", "provider", "us"), [(100.0, "triton", 90.0), (50.0, "torch", 50.0)])
def test_the_entry_is_the_fastest_with_its_justification(tmp_path, torchs, provider, us):
    entry = entry_for(CONCAT, KEY, [SLOW, BROKEN, FAST], Clock(torchs), Journal(tmp_path / "j", HEADER))
    assert (entry["provider"], entry["us"]) == (provider, us)
    assert entry["config"] == (FAST.to_dict() if provider == "triton" else None)
    assert (entry["rival"], entry["rival_us"]) == (("torch", torchs) if provider == "triton" else ("triton", 90.0))
    write_table(tmp_path / "t.json", HEADER, [entry])
    parsed = parse_table((tmp_path / "t.json").read_text(), "sm_90")
    assert parsed["concat", "bfloat16", 4096, 8192] == [(576, FAST if provider == "triton" else None)]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_nothing_runs_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="none of 1"):
        entry_for(CONCAT, KEY, [BROKEN], Clock(), Journal(tmp_path / "j", HEADER))


# What a process that died while writing leaves behind, and what else is no measurement.
BROKEN_LINES = [
    '{"problem": "conc',
    "12",
    "[]",
    "null",
    '{"problem": 1, "dtype": 2, "m": 3, "config": 7, "us": 1}',
    "\x00\ufffd",
]


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, line):
    path, clock = tmp_path / "journal.jsonl", Clock()
    first = entry_for(CONCAT, KEY, [FAST, BROKEN], clock, Journal(path, HEADER))
    assert clock.calls == 3
    path.write_text(path.read_text() + "\n" + line)
    again = entry_for(CONCAT, KEY, [FAST, BROKEN, SLOW], clock, Journal(path, HEADER))
    assert clock.calls == 4, "only the new configuration is measured"
    assert again == first
    assert entry_for(CONCAT, KEY, [SLOW], clock, Journal(path, HEADER))["us"] == 100.0
    assert clock.calls == 4, "what followed the broken line was kept"


@pytest.mark.parametrize("beginning", ['{"device": "Te', '{"device": "Other"}'])
def test_a_journal_of_another_device_or_none_is_refused(tmp_path, beginning):
    (tmp_path / "j").write_text(beginning)
    with pytest.raises(ValueError, match=r"--journal: .*name another"):
        Journal(tmp_path / "j", HEADER)


def test_a_second_search_keeps_what_the_first_found(tmp_path):
    """`--dtype float16` after bfloat16, or one batch again: the rest of the table stays."""
    path = tmp_path / "t.json"
    first, second, again = (
        entry_for(CONCAT, Key("concat", dtype, m), [FAST], Clock(), Journal(tmp_path / name, HEADER))
        for dtype, m, name in (("bfloat16", 576, "a"), ("float16", 576, "a"), ("bfloat16", 576, "b"))
    )
    again["us"] = 80.0
    entries = search.entries_of(path, HEADER)
    for entry in (first, second, again):
        entries = search.with_entry(entries, entry)
        write_table(path, HEADER, entries)
        assert search.entries_of(path, HEADER) == entries
    assert entries == [second, again]


def test_a_table_of_other_versions_is_begun_anew(tmp_path, capsys):
    path = tmp_path / "t.json"
    write_table(path, HEADER, [entry_for(CONCAT, KEY, [FAST], Clock(), Journal(tmp_path / "a", HEADER))])
    assert search.entries_of(path, {**HEADER, "triton": "9"}) == []
    assert "other versions" in capsys.readouterr().out
    path.write_text("{")
    assert search.entries_of(path, HEADER) == []
    assert "will be replaced" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (([], "no GPU"), (["--batch", "0"], "expected at least 1")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert words in capsys.readouterr().err


def test_problems_name_stages_that_tables_know():
    assert {p.kind for p in PROBLEMS.values()} == set(STAGES)
    assert [p.k for p in PROBLEMS.values()][:5] == [8192, 4096, 4096, 4096, 16384]
