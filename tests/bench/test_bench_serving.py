"""If this fails, the served times are taken apart wrongly: rounds not paired, or a file that its own check refuses."""

import pytest

from bench.report.page import write_report
from bench.results import write
from bench.serving import main, picture, prompts, report, rows_of


def answer(first_ms, per_second, tokens):
    return {"ttft_ms": [first_ms, first_ms, 10 * first_ms], "requests_per_s": per_second, "prompt_tokens": tokens}


@pytest.fixture
def result():
    # The machine is twice as slow in the second round; LLaVA-STF is three times as fast in each.
    rounds = [[answer(slow * 300, 1 / slow, 616), answer(slow * 100, 2 / slow, 184)] for slow in (1, 2, 1, 1)]
    rows, ratios = rows_of(rounds)
    found = {"schema": 1, "kind": "serving", "complete": True, "device": "CPU", "torch": "2", "transformers": "5"}
    found |= {"vllm": "0.32.0", "commit": "abc", "notes": [], "preset": "small", "dtype": "float32", "words": 40}
    return found | {"concurrency": 4, "requests": 8, "new_tokens": 8, "rows": rows, "ratios": ratios}


def test_rounds_are_paired_in_the_file_and_its_page(result, tmp_path):
    assert [row["ttft_ms"] for row in result["rows"]] == [300, 100]
    assert result["ratios"]["ttft_ms"] == pytest.approx({"ratio": 3, "low": 3, "high": 3})
    assert result["ratios"]["requests_per_s"] == pytest.approx({"ratio": 2, "low": 2, "high": 2})
    assert "First token sooner: 3.00x (3.00 to 3.00, p10 to p90 of 4 paired rounds)" in report(result)
    write(tmp_path / "serving.json", result)
    page, _ = write_report([tmp_path / "serving.json"], tmp_path)
    assert "requests per second: 2.00x" in page.read_text()


def test_no_request_repeats_another():
    """A picture or a prompt seen before would be answered from a cache."""
    sent = [str(message) for seed in range(3) for message in prompts(seed, 4, 10)]
    assert len(set(sent)) == len({picture(seed) for seed in range(12)}) == 12
    assert prompts(1, 4, 10) == prompts(1, 4, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "FOLDER"], "give --model and --stf together"),
        ([], "vLLM is not installed: make .venv-vllm/.installed"),
    ],
)
def test_bad_arguments(arguments, words, capsys, monkeypatch, tmp_path):
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.serving.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err
