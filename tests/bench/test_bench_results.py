"""If this fails, a result file can be half written, or a broken one can pass for a measurement."""

import copy
import json

import pytest
from support.sample_results import kernels_result, prefill_result

from bench.command import BadInput
from bench.results import check, read, write

BROKEN = [
    (prefill_result, lambda r: r["rows"][0].pop("insert_ms"), r"file: rows\[0\]: 'insert_ms' is a required property"),
    (prefill_result, lambda r: r["rows"][0]["samples"].update(total_ms=[0.0]), r"total_ms\[0\]: 0.0 is less than or"),
    (kernels_result, lambda r: r.update(kind=["kernels"]), "kind: expected one of"),
    (kernels_result, lambda r: r.update(schema=7), "schema: expected 1, got 7; measure again"),
    (kernels_result, lambda r: r.pop("commit"), "'commit' is a required property"),
    (kernels_result, lambda r: r["rows"][0].update(us="fast"), r"rows\[0\].us: 'fast' is not of type 'number', 'null'"),
]


@pytest.mark.parametrize(("make", "change", "message"), BROKEN)
def test_what_the_page_and_the_chart_read_is_checked_before_them_by_field(make, change, message):
    result = copy.deepcopy(make())
    check(result, "file")
    change(result)
    with pytest.raises(BadInput, match=message):
        check(result, "file")


def test_what_is_written_is_read_and_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    write(path, kernels_result())
    for wrong in ({"rows": [object()]}, {"rows": [float("nan")]}):
        with pytest.raises((TypeError, ValueError)):
            write(path, wrong)
    assert read(path) == kernels_result()
    assert list(path.parent.iterdir()) == [path]


def test_a_run_under_way_does_not_cost_the_whole_result_before_it(tmp_path):
    path, whole = tmp_path / "kernels.json", kernels_result()
    for complete, left in ((True, []), (False, [True]), (False, [True]), (True, [])):
        write(path, whole | {"complete": complete})
        assert [read(other)["complete"] for other in tmp_path.glob("*.previous.json")] == left
        assert read(path)["complete"] is complete


def test_a_file_cut_short_is_named(tmp_path):
    path = tmp_path / "kernels.json"
    text = json.dumps(kernels_result())
    for foreign in (text[:-20], text.replace("300.0", "NaN"), "[" * 100_000, "1" * 10_000, "\x00"):
        path.write_text(foreign)
        with pytest.raises(BadInput, match=r"kernels\.json: not JSON, perhaps cut short"):
            read(path)
    with pytest.raises(BadInput, match=r"absent\.json: cannot be read"):
        read(tmp_path / "absent.json")
