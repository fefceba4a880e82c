"""If this fails, a result file can be half written, or a broken one can pass for a measurement."""

import copy
import json
from pathlib import Path

import pytest
from sample_results import prefill_result

from bench import gpu
from bench.results import ResultError, check, read, write

KERNELS = {
    "schema": 1, "kind": "kernels", "device": "a", "torch": "2", "triton": None, "commit": "c", "clock_mhz": None,
    "rows": [{
        "stage": "G1", "batch": 1, "dtype": "bfloat16", "provider": "stf", "us": 1.5, "us_eager": 2, "floor_us": 1.0,
        "rel_error": None,
    }],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["rows"][0].pop("insert_ms"), r"rows\[0\]: insert_ms: missing"),
        (lambda r: r["rows"][0].pop("floor_ratio"), "floor_ratio: missing"),
        (lambda r: r["rows"][0]["floor_ratio"].update(vision_ms="a"), "floor_ratio: vision_ms: expected float"),
        (lambda r: r["rows"][0]["samples"].update(total_ms="abc"), "samples: total_ms: expected list"),
        (lambda r: r["rows"][0]["samples"].update(total_ms=[0.0]), r"total_ms\[0\]: expected a number above 0 or null"),
        (lambda r: r["rows"][0]["wall_samples"].pop("vision_ms"), "wall_samples: vision_ms: missing"),
        (lambda r: r["rows"][0].update(vision_ms=float("nan")), "vision_ms: expected float or null, got nan"),
        (lambda r: r["rows"][0].update(vision_ms=10**400), "vision_ms: expected float or null, got 1000"),
        (lambda r: r["savings_mean"].update(x=1), "savings_mean: x: expected str"),
        (lambda r: r.update(clocks_mhz=3), "clocks_mhz: expected list"),
        (lambda r: r["comparisons"][0].update(images=[1]), r"comparisons\[0\]: images: expected int"),
        (lambda r: r["rows"][0]["samples"].update(total_ms=["a"]), r"total_ms\[0\]: expected a number above 0 or null"),
        (lambda r: r["rows"][0].update(savings=7), "savings: expected list"),
        (lambda r: r["comparisons"][0].update(ratio="a"), r"comparisons\[0\]: ratio: expected float"),
        (lambda r: r["checks"].append("fine"), r"checks\[1\]: expected an object"),
        (lambda r: r.pop("comparisons"), "comparisons: missing"),
    ],
)
def test_what_the_page_and_the_charts_read_is_checked_before_them(change, message):
    result = prefill_result()
    check(result, "file")
    change(result)
    with pytest.raises(ResultError, match=message):
        check(result, "file")


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "new" / "kernels.json", KERNELS)
    assert read(tmp_path / "new" / "kernels.json") == KERNELS


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "kernels.json"
    write(path, KERNELS)
    for broken in ({"rows": [object()]}, {"rows": [float("nan")]}):
        with pytest.raises((TypeError, ValueError)):
            write(path, broken)
    assert read(path) == KERNELS
    assert [entry.name for entry in tmp_path.iterdir()] == ["kernels.json"]


def test_a_file_cut_short_is_named(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(KERNELS)[:-20])
    with pytest.raises(ResultError, match=r"kernels\.json: not JSON, perhaps cut short"):
        read(path)
    for foreign in ("[" * 100_000, "1" * 10_000, "\x00"):
        path.write_text(foreign)
        with pytest.raises(ResultError, match=r"kernels\.json: not JSON"):
            read(path)
    with pytest.raises(ResultError, match=r"absent\.json: cannot be read"):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(kind="speed"), "kind"),
        (lambda r: r.update(kind=["kernels"]), "kind: expected one of"),
        (lambda r: r["rows"][0].update(floor_us=0), r"rows\[0\]: floor_us: expected a number above 0, got 0"),
        (lambda r: r["rows"][0].update({"pass": 1}), r"rows\[0\]: pass: expected str, got 1"),
        (lambda r: r["rows"][0].update(failed=[]), r"rows\[0\]: failed: expected str or null"),
        (lambda r: r.update(schema=7), "schema"),
        (lambda r: r.pop("commit"), "commit: missing"),
        (lambda r: r.update(torch=None), "torch: expected str"),
        (lambda r: r["rows"][0].pop("floor_us"), r"rows\[0\]: floor_us: missing"),
        (lambda r: r["rows"][0].update(batch="1"), r"rows\[0\]: batch: expected int"),
        (lambda r: r["rows"][0].update(batch=True), r"rows\[0\]: batch: expected int"),
        (lambda r: r["rows"][0].update(us="fast"), r"rows\[0\]: us: expected a number above 0 or null"),
        (lambda r: r["rows"].append(3), r"rows\[1\]: expected an object"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_field(change, message):
    result = copy.deepcopy(KERNELS)
    check(result, "file")
    change(result)
    with pytest.raises(ResultError, match=message):
        check(result, "file")


def test_every_file_under_results_is_one_that_can_be_read():
    for path in sorted((Path(gpu.ROOT) / "bench" / "results").rglob("*.json")):
        assert json.loads(path.read_text())["commit"]
        read(path)
