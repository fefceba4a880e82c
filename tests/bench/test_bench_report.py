"""If this fails, the page shows other numbers than the file, or two runs are called different that are not."""

import base64
import copy
import html.parser
import random
import re

import pytest
from sample_results import KERNELS, prefill_result

from bench import charts, report, side_by_side
from bench.results import read, write


class Page(html.parser.HTMLParser):
    """Cells, sources and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "a" / "prefill.json", prefill_result())
    write(tmp_path / "a" / "kernels.json", KERNELS)
    return tmp_path / "a" / "prefill.json", tmp_path / "a" / "kernels.json"


def test_the_page_shows_the_numbers_and_needs_no_network(files, tmp_path):
    assert report.main([*map(str, files), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert not page.open
    for cell in ("123.25", "50.50", "2.44 [2.40, 2.45]", "1.70", "10.10 (20.0 %)", "200.0", "1.50"):
        assert cell in page.cells
    assert page.cells.count("2.76 [2.70, 2.80]") == page.cells.count("2.67 [2.60, 2.70]") == 1
    assert page.cells.count("llava-stf/fused+savings") == 8  # two batches in four tables
    assert "30.81" in page.cells  # wall clock
    assert text.count('<tr class="new">') == 3  # batch 8 after 1, in three tables; LLaVA-1.5 comes first there
    assert text.count('<tr class="own new">') == 2 * 3  # back to batch 1, and to 8: a fused row first
    assert "GPU &lt;1&gt;" in text
    assert "rows &lt;written&gt; in place" in text
    assert "before rows named their savings" not in text
    assert "<script" not in text
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"https?://", text)


def test_charts_are_embedded_as_written_or_their_absence_is_said(files, tmp_path, monkeypatch):
    path, note = report.write_report([files[0]], tmp_path)
    pngs = sorted(tmp_path.glob("*.png"))
    if charts.available():
        assert [png.name for png in pngs] == ["floor.png", "speedup.png", "stages.png"]
        for png in pngs:
            assert png.read_bytes().startswith(b"\x89PNG")
            assert base64.b64encode(png.read_bytes()).decode() in path.read_text()
    monkeypatch.setattr(charts, "available", lambda: False)
    path, note = report.write_report([files[0]], tmp_path / "without")
    assert "matplotlib" in note
    assert "matplotlib" in path.read_text()
    assert list((tmp_path / "without").iterdir()) == [path]


def test_the_page_alone_says_what_its_rows_and_numbers_are(tmp_path):
    result = prefill_result() | {
        "flags": {"threads": 3, "tf32": False},
        "ceilings": {"flops": 2e14, "bandwidth": 3e12, "source": "measured in this run"},
    }
    result["comparisons"][0]["beyond_noise"] = None
    write(tmp_path / "prefill.json", result)
    text = report.write_report([tmp_path / "prefill.json"], tmp_path)[0].read_text()
    for said in (
        "threads 3, tf32 False", "200 TFLOP/s, 3000 GB/s, measured in this run", "preprocessing is not in it",
        "<dt>llava-stf/fused</dt><dd>LLaVA-STF, the same projector", "fewer than 4 rounds cannot tell it from noise",
    ):  # fmt: skip
        assert said in text
    assert "<dt>llava-1.5-pool" not in text  # no such row
    header = re.search(r'id="totals"><thead><tr>(.*?)</tr>', text).group(1)
    rounds = re.findall(r"<th[^>]*>(.*?)</th>", header).index("rounds")
    first = re.search(r'id="totals">.*?<tbody><tr>(.*?)</tr>', text).group(1)
    assert re.findall(r"<td[^>]*>(.*?)</td>", first)[rounds] == "4"


def test_an_incomplete_or_refused_run_is_marked(tmp_path):
    result = {**prefill_result(), "complete": False, "refused": "logits differ", "comparisons": []}
    write(tmp_path / "prefill.json", result)
    text = report.write_report([tmp_path / "prefill.json"], tmp_path)[0].read_text()
    assert "This run is incomplete" in text
    assert "No speed-up is reported: logits differ" in text


def test_compare_says_what_is_more_than_noise(files, tmp_path, capsys):
    other = copy.deepcopy(prefill_result())
    other["rows"][0]["samples"]["total_ms"] = [121.0, 124.0, 124.0, 125.5]  # overlaps
    other["rows"][1]["samples"]["total_ms"] = [40.0, 40.5, 40.5, 41.0]
    other["rows"][2]["samples"]["total_ms"] = [900.0, 910.0, 905.0, 905.0]
    other["rows"][3]["samples"]["total_ms"] = [100.0] * 3
    write(tmp_path / "b.json", other)
    assert report.main(["--compare", str(files[0]), str(tmp_path / "b.json")]) == 0
    verdicts = [line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()[4:8]]
    assert verdicts == ["within noise", "faster", "SLOWER", "too few rounds"]


def test_compare_sees_a_speed_up_that_changed_although_both_rows_moved(files, tmp_path, capsys):
    other = copy.deepcopy(prefill_result())
    other["comparisons"][0] |= {"ratio": 2.43, "low": 2.41, "high": 2.5}
    other["comparisons"][1] |= {"ratio": 2.4, "low": 2.3, "high": 2.5}
    write(tmp_path / "b.json", other)
    assert report.main(["--compare", str(files[0]), str(tmp_path / "b.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines[lines.index("", 2) :] if line.startswith("llava-stf/fused ")]
    assert [line.split("  ")[-1].strip() for line in shown] == ["within noise", "DIFFERS"]
    assert "2.67 [2.60, 2.70]  2.40 [2.30, 2.50]" in shown[1]
    other["rows"][3]["samples"]["total_ms"] = [300.0] * 3
    write(tmp_path / "b.json", other)
    assert report.main(["--compare", str(files[0]), str(tmp_path / "b.json")]) == 0
    assert any(line.endswith("2.40 [2.30, 2.50]  too few rounds") for line in capsys.readouterr().out.splitlines())


def before_savings():
    """A file as runs wrote it when both LLaVA-STF rows had every saving and none said so."""
    result = prefill_result()
    result["rows"] = [{k: v for k, v in row.items() if k != "savings"} for row in result["rows"][:4]]
    result["comparisons"] = result["comparisons"][:2]
    del result["savings_mean"]
    return result


def test_runs_stand_side_by_side_and_no_ratio_is_taken_across_them(files, tmp_path):
    write(tmp_path / "b" / "prefill.json", {**prefill_result(), "device": "another", "preset": "13b"})
    write(tmp_path / "c" / "prefill.json", before_savings())
    many = [files[0], tmp_path / "b" / "prefill.json", files[1], tmp_path / "c" / "prefill.json"]
    results = [(str(path), read(path)) for path in many]
    header, rows = side_by_side.lines(results)
    assert [cell.split(": ")[-1] for cell in header[5:]] == [
        "7b on GPU <1>, bfloat16", "13b on another, bfloat16", "7b on GPU <1>, bfloat16",
    ]  # fmt: skip
    shown = {row[:5]: row[5:] for row in rows}
    assert shown["llava-1.5/mlp2x", "eager", "1", "40", "1"] == ("123.25",) * 3
    assert shown["llava-stf/fused", "eager", "8", "40", "1"] == ("300.00 (2.67x)", "300.00 (2.67x)", "-")
    saving = shown["llava-stf/fused+savings", "eager", "8", "40", "1"]
    assert saving == ("290.00 (2.76x)", "290.00 (2.76x)", "300.00 (2.67x)")  # what the old file's row was
    text = report.write_report(many, tmp_path)[0].read_text()
    assert 'id="side-by-side"' in text
    assert 'id="side-by-side"' not in report.write_report(many[:1], tmp_path)[0].read_text()
    assert 'id="side-by-side"' not in report.write_report([many[0], many[2]], tmp_path)[0].read_text()


def test_a_file_from_before_savings_were_named_is_shown_and_compared_for_what_it_is(files, tmp_path, capsys):
    old = tmp_path / "old.json"
    write(old, before_savings())
    text = report.write_report([old], tmp_path)[0].read_text()
    assert "before rows named their savings" in text
    assert "+savings" not in text
    assert report.main(["--compare", str(old), str(files[0])]) == 0
    printed = capsys.readouterr().out
    assert "old.json is from before rows named their savings" in printed
    assert "llava-stf" not in printed
    assert printed.count("within noise") == 2  # LLaVA-1.5 at two batches
    assert report.main(["--compare", str(old), str(old)]) == 0
    assert capsys.readouterr().out.count("within noise") == 4 + 2


def test_a_row_with_every_saving_is_compared_with_its_like(files, capsys):
    assert report.main(["--compare", str(files[0]), str(files[0])]) == 0
    printed = capsys.readouterr().out
    assert printed.count("within noise") == 6 + 4
    assert "1.000" in next(line for line in printed.splitlines() if "fused+savings" in line)


@pytest.mark.skipif(not charts.available(), reason="needs matplotlib")
def test_no_two_lines_of_a_chart_look_alike():
    rows = ("a", "b", "c", "d", "e", "f")
    keys = [(row, (mode, text)) for row in rows for mode in ("eager", "graph") for text in (64, 256)]
    styles = [tuple(sorted(style.items())) for style in charts._styles(keys)]
    assert len(set(styles)) == len(keys)
    colours = {dict(style)["color"] for style, key in zip(styles, keys, strict=True) if key[0] == "a"}
    assert len(colours) == 1


def test_two_runs_of_one_machine_agree_within_their_spread(tmp_path):
    """As long as the noise is the same: 200 pairs of runs of seven rounds, drawn from one distribution."""
    draws = random.Random(4)

    def samples():
        return [draws.lognormvariate(3.0, 0.2) for _ in range(7)]

    verdicts = [report._difference(samples(), samples())[-1] for _ in range(200)]
    assert verdicts.count("within noise") >= 195
    shifted = [report._difference(samples(), [2 * x for x in samples()])[-1] for _ in range(200)]
    assert shifted.count("SLOWER") >= 195


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "another GPU"}, "device"),
        ({"dtype": "float16"}, "dtype"),
        ({"rows": []}, "no measured row in common"),
        ({"schema": 0}, "schema"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(files, tmp_path, capsys, change, words):
    write(tmp_path / "b.json", {**prefill_result(), **change})
    assert report.main(["--compare", str(files[0]), str(tmp_path / "b.json")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "error" in error


def test_a_file_that_is_no_result_is_refused(files, tmp_path, capsys):
    (tmp_path / "cut.json").write_text(files[0].read_text()[:100])
    assert report.main([str(tmp_path / "cut.json")]) == 2
    assert "cut.json" in capsys.readouterr().err
    assert report.main(["--compare", str(files[0]), str(files[1])]) == 2
    assert read(files[0])["kind"] in capsys.readouterr().err
