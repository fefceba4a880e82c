"""If these fail, the offline search forgets what it measured, or writes a wrong table."""

import pytest
import torch

from stf_kernels.configs import GemmConfig
from stf_kernels.configs.tables import STAGES, parse_table
from stf_kernels.tune.__main__ import main
from stf_kernels.tune.problems import PROBLEMS
from stf_kernels.tune.search import TableFile, entry_for

HEADER = {"device": "Test GPU", "arch": "sm_90", "commit": "x", "torch": "2", "triton": "3"}
CONCAT = PROBLEMS["concat"]
FAST, SLOW = GemmConfig(128, 128, 64), GemmConfig(64, 64, 64)


def entry(torchs=100.0, configs=(SLOW, FAST), dtype="bfloat16", m=576):
    """On a fake GPU with a time for every configuration."""
    times = {None: torchs, FAST: 90.0, SLOW: 120.0}
    return entry_for(CONCAT, dtype, m, {config: times[config] for config in (None, *configs)})


@pytest.mark.parametrize(
    ("torchs", "provider", "us"), [(100.0, "triton", 90.0), (91.0, "torch", 91.0), (50.0, "torch", 50.0)]
)
def test_the_entry_is_the_fastest_with_its_justification(tmp_path, torchs, provider, us):
    found = entry(torchs)
    assert (found["provider"], found["us"]) == (provider, us)
    assert found["config"] == (FAST.to_dict() if provider == "triton" else None)
    assert (found["rival"], found["rival_us"]) == (("torch", torchs) if provider == "triton" else ("triton", 90.0))
    TableFile(tmp_path / "t.json", HEADER).add(found)
    parsed = parse_table((tmp_path / "t.json").read_text(), "sm_90")
    assert parsed["concat", "bfloat16", 4096, 8192] == [(576, FAST if provider == "triton" else None)]
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"], "nothing half-written is left"


def test_nothing_runs_is_an_error():
    with pytest.raises(RuntimeError, match="concat, bfloat16, m 576: no configuration runs"):
        entry(configs=[])


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    """`--dtype float16` after bfloat16, or one batch again: the rest of the table stays."""
    path = tmp_path / "t.json"
    first, second, again = entry(), entry(dtype="float16"), entry() | {"us": 80.0}
    assert not TableFile(path, HEADER).knows(CONCAT, "bfloat16", 576)
    for added in (first, second, again):
        TableFile(path, HEADER).add(added)
        assert added in TableFile(path, HEADER).entries
    table = TableFile(path, HEADER)
    assert table.entries == [second, again]
    assert table.knows(CONCAT, "bfloat16", 576)
    assert not table.knows(CONCAT, "bfloat16", 1152)


def test_a_table_of_other_versions_is_begun_anew(tmp_path, capsys):
    path = tmp_path / "t.json"
    TableFile(path, HEADER).add(entry())
    assert TableFile(path, {**HEADER, "triton": "9"}).entries == []
    assert "other versions" in capsys.readouterr().out
    path.write_text("{")
    assert TableFile(path, HEADER).entries == []
    assert "will be replaced" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in (([], "no GPU"), (["--batch", "0"], "at least 1")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert words in capsys.readouterr().err


def test_problems_name_stages_that_tables_know():
    assert {p.kind for p in PROBLEMS.values()} | {"linear_wgrad"} == set(STAGES)
    assert [p.k for p in PROBLEMS.values()][:5] == [8192, 4096, 4096, 4096, 16384]
