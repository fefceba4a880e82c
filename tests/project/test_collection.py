"""If this fails, pytest leaves tests out without saying so, or a slow one is taken for fast."""

import runpy

from support.processes import ROOT, python


def test_without_the_interpreter():
    """They are left out, and the header says how to run them."""
    code = "import conftest; print(conftest.collect_ignore, *conftest.pytest_report_header(None))"
    text = python("-c", code, PYTHONPATH=f"{ROOT}/tests:{ROOT}").stdout
    assert text.startswith("['interpreter', 'browser']")
    assert "TRITON_INTERPRET=1 python -m pytest tests/interpreter" in text


def test_slow_tests_come_last_and_can_be_left_out():
    """So that a run shows progress at once. A file in conftest.SLOW that has moved would silently be fast again."""
    names = runpy.run_path(str(ROOT / "tests/conftest.py"))["SLOW"]
    assert all((ROOT / name).exists() for name in names)
    slow, fast = "tests/project/test_examples.py", "tests/project/test_wheel.py"
    for options, kinds in ([], {True, False}), (["-m", "not slow"], {False}):
        found = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", slow, fast, *options).stdout
        are_slow = [test.startswith(slow) for test in found.splitlines() if "::" in test]
        assert are_slow == sorted(are_slow)
        assert set(are_slow) == kinds
