"""If these fail, the offline search measures what cannot run, forgets what it measured, or writes a wrong table."""

import json
import os
from dataclasses import replace

import pytest
import torch

from stf_kernels.ops.descriptors import layout_for
from stf_kernels.problems import PROBLEMS
from stf_kernels.tuning import GemmConfig, search
from stf_kernels.tuning.__main__ import main
from stf_kernels.tuning.launch_bench import LaunchBench
from stf_kernels.tuning.lookup import parse_table
from stf_kernels.tuning.search import Journal, Key, candidates, entry_for, forms_for, write_table

HEADER = {"device": "Test GPU", "arch": "sm_90", "commit": "x", "torch": "2", "triton": "3"}
CONCAT = PROBLEMS["concat"]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("limit", [65_536, 101_376, 232_448])
def test_candidates_fit_shared_memory_and_registers(itemsize, limit):
    found = candidates(576, 4096, 8192, itemsize, shared_limit=limit, multiprocessors=132)
    assert len(found) == len(set(found)) > 20
    for config in found:
        assert config.shared_bytes(itemsize) <= limit
        assert config.block_m * config.block_n / (32 * config.num_warps) <= 128


def test_few_rows_put_split_k_first_and_many_rows_do_not():
    few, many = (candidates(m, 1024, 4096, 2, shared_limit=232_448, multiprocessors=132)[0] for m in (144, 36_864))
    assert few.split_k > 1
    assert many.split_k == 1
    assert many.block_m * many.block_n >= 128 * 128


def test_a_search_cut_short_has_tried_every_promising_tile():
    found = candidates(576, 4096, 8192, 2, shared_limit=232_448, multiprocessors=132)
    shapes = [(c.block_m, c.block_n, c.split_k) for c in found]
    distinct = len(set(shapes))
    assert len(set(shapes[:distinct])) == distinct


HOPPER = {"shared_limit": 232_448, "multiprocessors": 132}


def test_forms_are_tried_where_they_run():
    linear, merge = PROBLEMS["linear"], PROBLEMS["merge"]
    assert set(forms_for(linear, "sm_90", 2)) == {"pointers", "descriptors", "swapped"}
    assert set(forms_for(CONCAT, "sm_90", 2)) == {"pointers", "descriptors"}
    for problem, arch, itemsize in ((merge, "sm_90", 2), (linear, "sm_80", 2), (linear, "sm_90", 4)):
        assert forms_for(problem, arch, itemsize) == ("pointers",)


def test_one_image_puts_the_swapped_form_first():
    """144 rows are 128 + 16 there, and two tiles of 128 elsewhere."""
    found = candidates(144, 16384, 4096, 2, forms=forms_for(PROBLEMS["linear"], "sm_90", 2), **HOPPER)
    assert (found[0].form, found[0].rows) == ("swapped", 144)
    assert {config.form for config in found[:24]} >= {"swapped", "descriptors"}


def test_many_rows_put_descriptors_first():
    found = candidates(18432, 4096, 8192, 2, forms=forms_for(CONCAT, "sm_90", 2), **HOPPER)
    assert found[0].form == "descriptors"
    assert {config.form for config in found[:24]} == {"descriptors", "pointers"}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["concat", "linear_merge", "linear", "linear_scatter"])
def test_every_candidate_is_measured_as_what_it_is(name, batch, monkeypatch):
    """On operands that no descriptor names a launch falls back, and the table would praise the wrong kernel."""
    problem = PROBLEMS[name]
    on_the_cpu(monkeypatch)
    monkeypatch.setattr("stf_kernels.ops.descriptors.is_hopper_or_later", lambda device: True)
    bench = search.Bench(replace(problem, c=128, n=256), torch.bfloat16, batch)
    found = candidates(batch * problem.tokens, problem.n, problem.k, 2, forms=forms_for(problem, "sm_90", 2), **HOPPER)
    for config in found[:24]:
        if config.form != "pointers":
            assert layout_for(bench._blocks, bench._weight, problem.stage, config) is not None, config


def on_the_cpu(monkeypatch):
    """search.Bench draws on a GPU; here it draws on the CPU and flushes nothing."""
    generator, real = torch.Generator, torch.randn
    # a class, because torch's own annotations name it when a module is first imported
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {"__new__": lambda cls, device: generator()}))
    monkeypatch.setattr(torch, "randn", lambda shape, device, generator: real(shape, generator=generator))
    monkeypatch.setattr(search, "Flush", lambda device: None)


@pytest.mark.parametrize("name", ["concat_wgrad", "merge_wgrad"])
def test_a_weight_gradient_is_measured_against_the_library(name, monkeypatch):
    """config None must be the library's sum over the same rows, and on operands that it has to copy."""
    on_the_cpu(monkeypatch)
    asked = []
    monkeypatch.setattr(search.weight_grad, "launch_segmented_wgrad", lambda *a: asked.append(a) or a[0])
    bench = search.Bench(replace(PROBLEMS[name], c=16, n=24), torch.bfloat16, 2)
    found = bench._run(None)
    rows = [segment.flatten(0, -2) for segment in PROBLEMS[name].stage.segments(bench._blocks)]
    torch.testing.assert_close(found, bench._g.t() @ torch.cat(rows, -1), rtol=2e-2, atol=2e-1)
    assert not any(map(search.weight_grad.has_one_row_stride, bench._blocks))
    assert asked == []
    bench._run(FAST)
    assert asked[0][-1] == FAST


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


def test_a_tile_that_the_compiler_refuses_is_one_that_does_not_run(monkeypatch, capsys):
    bench = search.Bench.__new__(search.Bench)
    bench._problem, bench._blocks, bench._weight, bench._bias, bench._g = CONCAT, [], None, None, None

    def fail(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(search.launch, "launch_stage", fail)
    message = "PassManager::run failed"
    assert bench.microseconds(FAST) is None
    assert "does not compile" in capsys.readouterr().out
    message = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory"):
        bench.microseconds(FAST)


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
