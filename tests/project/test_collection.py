"""If this fails, pytest leaves tests out without saying so, or skips them for more than a missing GPU or C compiler."""

import runpy

from support.processes import ROOT, python


def collected(*arguments, **environment):
    result = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments, **environment)
    return result.stdout + result.stderr, [line for line in result.stdout.splitlines() if "::" in line]


def test_without_the_interpreter():
    """They are left out, and the header says how to run them."""
    code = "import conftest; print(conftest.collect_ignore, *conftest.pytest_report_header(None))"
    text = python("-c", code, PYTHONPATH=f"{ROOT}/tests:{ROOT}").stdout
    assert text.startswith("['interpreter']")
    assert "TRITON_INTERPRET=1 python -m pytest tests/interpreter" in text


def test_with_the_interpreter():
    _, tests = collected("tests/interpreter", TRITON_INTERPRET="1")
    assert sum(test.startswith("tests/interpreter") for test in tests) > 100


def test_slow_tests_come_last_and_can_be_left_out():
    """So that a run shows progress at once. A file in conftest.SLOW that has moved would silently be fast again."""
    names = runpy.run_path(str(ROOT / "tests/conftest.py"))["SLOW"]
    assert all((ROOT / name).exists() for name in names)
    slow, fast = "tests/project/test_examples.py", "tests/project/test_wheel.py"
    _, tests = collected(slow, fast)
    are_slow = [test.startswith(slow) for test in tests]
    assert are_slow == sorted(are_slow)
    assert set(are_slow) == {True, False}
    _, quick = collected(slow, fast, "-m", "not slow")
    assert quick == [test for test in tests if test.startswith(fast)]
