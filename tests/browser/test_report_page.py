"""If this fails, the report that people open is cut off, lacks charts, or shows other figures than the JSON."""

import re

import pytest
from sample_results import KERNELS, prefill_result

from bench import charts, report
from bench.results import read, write
from bench.speedup import label

A4 = 703  # CSS pixels between the margins of an A4 page: (210 - 2 * 12) mm at 96 to the inch
EXPECTED_CHARTS = 4  # stages, speed-up and floor of the prefill; the kernels' floor


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = prefill_result()
    result["notes"] = ["a/path/or/name/that/has/no/place/to/break/" + "x" * 120]
    failed = {**result["rows"][0], "batch": 32, "failed": "does not fit into memory (CUDA out of memory)"}
    failed |= {key: None for key in failed if key.endswith("_ms") or key in ("peak_mb", "kv_mb", "spread_percent")}
    failed |= {
        "projector_share": None,
        "shares": dict.fromkeys(failed["shares"]),
        "floor_ratio": dict.fromkeys(failed["floor_ratio"]),
    }
    result["rows"].append(failed)
    write(folder / "prefill.json", result)
    write(folder / "kernels.json", KERNELS)
    return folder / "prefill.json", folder / "kernels.json"


@pytest.fixture(scope="module")
def page(files, tmp_path_factory):
    assert charts.available(), charts.NO_MATPLOTLIB
    path, note = report.write_report(list(files), tmp_path_factory.mktemp("page"))
    assert note is None
    return path.resolve().as_uri()


def cells(browser, table):
    return browser.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )


def header(browser, table):
    return browser.evaluate(f"[...document.querySelectorAll('#{table} thead th')].map(c => c.textContent)")


def test_it_opens_without_a_network(browser, page):
    browser.open(page, width=1200)
    urls = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert page in urls
    assert [url for url in urls if url != page and not url.startswith("data:")] == []
    assert [e["params"] for e in browser.events if e.get("method") == "Network.loadingFailed"] == []
    assert browser.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("width", [320, 400, 768, 1200])
def test_nothing_sticks_out_at_any_width(browser, page, width):
    browser.open(page, width=width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    wide = browser.evaluate(
        "[...document.body.querySelectorAll(':not(.scroll *)')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


@pytest.mark.parametrize("width", [400, 1200])
def test_every_chart_is_there_and_large_enough_to_read(browser, page, width):
    browser.open(page, width=width)
    images = browser.evaluate(
        "[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight, i.alt, i.checkVisibility()])"
    )
    assert len(images) == EXPECTED_CHARTS
    for natural, shown_width, shown_height, alt, visible in images:
        assert natural >= shown_width  # never blown up
        assert shown_width >= 0.9 * min(width, 700)
        assert shown_height >= 120
        assert alt
        assert visible


def test_the_figures_are_those_of_the_files(browser, page, files):
    browser.open(page, width=1200)
    result = read(files[0])
    ratios = {(c["row"], c["batch"]): c for c in result["comparisons"]}
    shown = [dict(zip(header(browser, "totals"), row, strict=True)) for row in cells(browser, "totals")]
    assert len(shown) == len(result["rows"])
    for cell, row in zip(shown, result["rows"], strict=True):
        assert cell["model"] == label(row)
        for column, field in (("batch", "batch"), ("text", "text_tokens"), ("image tokens", "image_tokens")):
            assert int(cell[column]) == row[field]
        if row["failed"]:
            assert cell["total ms"] == "-"
            assert cell[""] == row["failed"]
            continue
        assert number(cell["total ms"]) == pytest.approx(row["total_ms"], abs=0.005)
        assert number(cell["peak MB"]) == pytest.approx(row["peak_mb"], abs=0.5)
        found = ratios.get((cell["model"], row["batch"]))
        expected = [found["ratio"], found["low"], found["high"]] if found else []
        assert [float(x) for x in re.findall(r"[\d.]+", cell["speed-up [p10, p90]"])] == pytest.approx(
            expected, abs=0.005
        )
    for table, source, digits in (
        ("stages", lambda row: row, 0.005),
        ("floors", lambda row: row["floor_ratio"], 0.005),
    ):
        for cell, row in zip(cells(browser, table), result["rows"], strict=True):
            named = dict(zip(header(browser, table), cell, strict=True))
            for column in ("vision", "projector", "insert", "prefill"):
                value = source(row)[f"{column}_ms"]
                assert (
                    named[column] == "-" if value is None else number(named[column]) == pytest.approx(value, abs=digits)
                )
    kernels = [dict(zip(header(browser, "kernels"), row, strict=True)) for row in cells(browser, "kernels")]
    assert [number(row["us"]) for row in kernels] == [row["us"] for row in read(files[1])["rows"]]


def number(text):
    return float(text.split(" (")[0].replace(",", ""))  # a share of the total stands behind some


def test_the_model_stays_in_sight_while_a_narrow_table_is_scrolled(browser, page):
    browser.open(page, width=400)
    left, scrolled = browser.evaluate(
        "(() => { const box = document.querySelector('#totals').parentElement; box.scrollLeft = 1e6;"
        " const cell = document.querySelector('#totals tbody td').getBoundingClientRect();"
        " return [cell.left - box.getBoundingClientRect().left, box.scrollLeft] })()"
    )
    assert scrolled > 0
    assert abs(left) < 1


@pytest.mark.parametrize(("width", "media"), [(A4, "print"), (1200, "screen"), (400, "screen")])
def test_three_runs_stand_side_by_side(browser, tmp_path, width, media):
    device = "A graphics processor with a rather long name, 144 GB, of another machine"
    for name in ("a", "b", "c"):
        write(tmp_path / name / "prefill.json", {**prefill_result(), "device": device})
    path, _ = report.write_report([tmp_path / name / "prefill.json" for name in ("a", "b", "c")], tmp_path)
    browser.open(path.resolve().as_uri(), width=width, media=media)
    rows = cells(browser, "side-by-side")
    assert ["llava-stf/fused+savings", "eager", "8", "40", "1", *["290.00 (2.76x)"] * 3] in rows
    box = browser.evaluate(
        "(() => { const t = document.querySelector('#side-by-side'), b = t.parentElement;"
        " return [t.getBoundingClientRect().right, b.scrollWidth > b.clientWidth] })()"
    )
    assert box[0] <= width or box[1]
    assert media == "screen" or box[0] <= width
    assert width < 1200 or not box[1]


def test_printed_every_column_is_on_the_paper(browser, page):
    browser.open(page, width=A4, media="print")
    assert browser.evaluate("matchMedia('print').matches")
    assert browser.evaluate("document.documentElement.scrollWidth") <= A4
    cut = browser.evaluate(
        "[...document.querySelectorAll('table, img')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map(e => e.id || e.alt)"
    )
    assert cut == []
    assert browser.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert browser.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    assert browser.evaluate("getComputedStyle(document.querySelector('thead')).display") == "table-header-group"
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
