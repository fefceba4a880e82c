"""transformers' own common tests, as `make test-transformers` has unpacked them; collected nowhere else.

Two modules that its sdist leaves out are empty here: GenerationTesterMixin and the export tests are not in it.
"""

import os
import re
import sys
from types import ModuleType

import pytest

SUITE = os.environ.get("TRANSFORMERS_SUITE", "")
collect_ignore_glob = [] if SUITE else ["test_*.py"]


def _module(name: str, **content: object) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(content, __path__=[])


if SUITE:
    sys.path.insert(0, SUITE)
    for folder, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        _module(f"common.{folder.partition('.')[0]}")
        _module(f"common.{folder}", **{mixin: type(mixin, (), {})})
    _module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)  # without a network


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.skipped and not any(re.search(reason, str(report.longrepr)) for reason in item.module.SKIPPED):
        report.outcome, report.longrepr = (
            "failed",
            f"skipped for a reason that SKIPPED does not explain: {report.longrepr}",
        )
    return report
