"""If this fails, the report that people open or print is cut off, or its chart is missing or too small to read."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.sample_results import kernels_result, prefill_result

from bench.report.page import write_report
from bench.results import write

A4 = 703  # CSS pixels between the margins of an A4 page: (210 - 2 * 12) mm at 96 to the inch
WIDTHS = [320, 400, 768, 1200, A4]


def chromium(*arguments):
    """A headless Chromium without a network: whatever the page would load fails."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(names)} is on the PATH; `make test-browser` as root installs Chromium on Debian"
        )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--proxy-server=127.0.0.1:9", "--allow-file-access-from-files", "--virtual-time-budget=20000"]
    return subprocess.run([found, *flags, *map(str, arguments)], capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, result = tmp_path_factory.mktemp("run"), prefill_result()
    result["notes"] = ["a/path/or/name/that/has/no/place/to/break/" + "x" * 120]
    failed = {**result["rows"][0], "batch": 32, "failed": "does not fit into memory (CUDA out of memory)"}
    empty = {key: None for key in failed if key.endswith(("_ms", "_mb", "_percent", "_share"))}
    result["rows"].append({**failed, **empty, "floor_ratio": dict.fromkeys(failed["floor_ratio"])})
    write(folder / "prefill.json", result)
    write(folder / "kernels.json", kernels_result())
    return write_report([folder / "prefill.json", folder / "kernels.json"], folder)[0]


@pytest.fixture(scope="module")
def seen(page):
    """What was seen at each width."""
    probe = page.with_name("probe.html")
    probe.write_text(Path(__file__).with_name("probe.html").read_text().replace("WIDTHS", json.dumps(WIDTHS)))
    title = re.search(r"<title>(\[.*?\])</title>", chromium("--dump-dom", probe.as_uri()), re.DOTALL)
    return {found["width"]: found for found in json.loads(title.group(1).replace("&lt;", "<").replace("&gt;", ">"))}


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_and_the_chart_is_large_enough_to_read(seen, width):
    assert seen[width]["scrolls"] <= width
    assert seen[width]["outside"] == []
    [(natural, shown_width, shown_height, visible)] = seen[width]["images"]
    assert natural >= shown_width >= (0.6 if width == A4 else 0.9) * min(width, 700)  # never blown up
    assert shown_height >= 100
    assert visible


def test_the_model_stays_in_sight_while_a_narrow_table_is_scrolled(seen):
    assert seen[400]["scrolled"] > 0
    assert abs(seen[400]["first"]) < 1
    assert seen[1200]["scrolled"] == 0


def test_printed_every_column_is_on_the_paper(seen, page):
    assert seen[A4]["cut"] == []
    pdf = page.with_name("report.pdf")
    chromium(f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())
    assert pdf.read_bytes().startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 4
