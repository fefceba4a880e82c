"""If this fails, the page shows other numbers than the file."""

import base64
import re

import pytest
from support.sample_results import kernels_result, prefill_result

from bench.command import BadInput
from bench.report import page
from bench.report.__main__ import main
from bench.results import write
from tests.support.processes import python


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "a" / "prefill.json", prefill_result())
    write(tmp_path / "a" / "kernels.json", kernels_result())
    return tmp_path / "a" / "prefill.json", tmp_path / "a" / "kernels.json"


def text_of(tmp_path, **change):
    write(tmp_path / "prefill.json", prefill_result() | change)
    return page.write_report([tmp_path / "prefill.json"], tmp_path)[0].read_text()


def test_the_page_shows_the_numbers_and_needs_no_network(files, tmp_path):
    assert main([*map(str, files), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", text)
    for cell in ("123.2", "50.5", "2.44x", "2.40 to 2.45", "1.70", "10.1", "200.0", "1.50x"):
        assert cell in cells
    assert text.count('class="new"') == 2  # batch 8 after 1, in both tables; LLaVA-1.5 comes first there
    assert "GPU &lt;1&gt;" in text
    assert "<script" not in text
    for said in (
        "<dt>threads</dt><dd>3</dd>", "200 TFLOP/s, 3000 GB/s, measured in this run", "preprocessing is not in it",
        "<dt>llava-stf/fused</dt><dd>LLaVA-STF, the same projector", "1755 to 1980 behind the rounds",
        "features: difference 1.0e-06 (allowed 1e-05)",
    ):  # fmt: skip
        assert said in text
    assert "<dt>llava-1.5-pool" not in text  # no such row
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="(.*?)"', text))
    assert not re.search(r"https?://", text)


def test_the_page_opens_with_its_verdict_and_the_chart(tmp_path):
    text = text_of(tmp_path)
    assert re.findall(r"<(h1|img|table|h2)\b", text) == ["h1", "img", "table", "table", "h2"]
    assert "<h1>LLaVA-STF gives its first token 2.44x sooner than LLaVA-1.5</h1>" in text
    assert "50.5 ms instead of 123.2, with 144 image tokens instead of 144: 7b on GPU &lt;1&gt;, eager" in text
    assert "Fused against plain PyTorch operators in the same model: 1.20x [1.20, 1.21]" in text
    slower = prefill_result()["comparisons"][:1]
    slower[0] |= {"ratio": 0.9, "beyond_noise": None}
    text = text_of(tmp_path, comparisons=slower)
    assert "first token LATER, at 0.90x the speed, than" in text
    assert "This speed-up may be noise: fewer than 4 rounds" in text


def test_the_chart_is_embedded_as_written_or_its_absence_is_said(files, tmp_path, monkeypatch):
    path, note = page.write_report([files[0]], tmp_path / "with")
    png = (tmp_path / "with" / "stages.png").read_bytes()
    assert note is None
    assert png.startswith(b"\x89PNG")
    assert base64.b64encode(png).decode() in path.read_text()
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    path, note = page.write_report([files[0]], tmp_path / "without")
    assert "matplotlib" in note
    assert "matplotlib" in path.read_text()
    assert list((tmp_path / "without").iterdir()) == [path]


def test_every_committed_result_has_a_page(tmp_path):
    results = sorted((page.Path(__file__).parents[2] / "bench" / "results").rglob("*.json"))
    text = page.write_report(results, tmp_path)[0].read_text()
    assert text.count('class="scroll"') >= len(results) > 4


def test_an_incomplete_or_refused_run_is_marked(tmp_path):
    text = text_of(tmp_path, complete=False, refused="logits differ", comparisons=[])
    assert "This run is incomplete" in text
    assert "No speed-up is reported: logits differ" in text
    assert not re.search(r"\d\.\d\dx", text)


def test_files_that_cannot_be_read_are_refused(files, tmp_path):
    (tmp_path / "cut.json").write_text(files[0].read_text()[:100])
    for arguments, named in (([tmp_path / "cut.json"], "cut.json"), ([files[0], "--out", files[1]], "--out")):
        with pytest.raises(BadInput, match=named):
            main([*map(str, arguments)])


def test_bad_input_is_a_line_and_status_2():
    done = python("-m", "bench.report", "/nowhere.json")
    said = "python -m bench.report: error: /nowhere.json: cannot be read (No such file or directory)\n"
    assert (done.returncode, done.stderr) == (2, said)
