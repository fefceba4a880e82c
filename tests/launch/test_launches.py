"""If these fail, a launch past Triton's JIT tells the GPU something else than the JIT would, a call repeats the launch
of another one, or an error that Triton raises for what a GPU does not take is not known as such.

Triton's own JIT and launcher run on a driver that only records (recording_driver.py), in processes of their own: a
process has one libcuda.
"""

import functools
import json
from pathlib import Path

import pytest
import recording_driver
from support.processes import python

pytestmark = pytest.mark.skipif(
    recording_driver.COMPILER is None, reason="no C compiler, which Triton's launcher needs, too"
)
ARCHS = ["sm_90", "sm_80"]
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
POINTER, TMA = "_segmented_linear_fwd_kernel", "_segmented_linear_tma_fwd_kernel"
SWAP_AB = "_linear_swap_ab_fwd_kernel"


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(arch, what): the answer of worker.py."""
    environment = recording_driver.build(tmp_path_factory.mktemp("driver"))

    @functools.cache
    def ask(arch: str, what: str) -> dict:
        done = python(str(Path(__file__).with_name("worker.py")), arch, what, timeout=900, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


@pytest.mark.parametrize("arch", ARCHS)
def test_a_repeated_launch_is_the_jits(ask, arch):
    """And no call takes another's: each is made where nothing is ready, then twice where all before it are."""
    for name, turns in ask(arch, "repeated").items():
        for turn in turns:
            [launch] = turn["launches"]
            assert launch.pop("stream") == turn["on"], name
            assert launch["parameters"], name
        cold, first, second = (turn["launches"] for turn in turns)
        assert first == cold, f"{name}: the launch of another call was repeated"
        assert second == cold, name


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_first_launch_of_a_layout_binds_its_arguments(ask, arch):
    found = ask(arch, "repeated")
    for name, turns in found.items():
        expected = [1, 0, 0] if "copied" in name else [1, 1, 0]  # once copied it is an earlier call
        assert [turn["bound"] for turn in turns] == expected, name


@pytest.mark.parametrize("arch", ARCHS)
def test_the_launch_is_the_configurations(ask, arch):
    """Kernel, programs, threads, and the attribute of a dependent launch, of tiles of 64x64 with 4 warps."""
    found = ask(arch, "repeated")
    expected = {
        "pointer": (POINTER, [18 * 8, 1, 1]),
        "another batch": (POINTER, [27 * 8, 1, 1]),
        "split K": (POINTER, [18 * 8, 4, 1]),
        "merged on load": (POINTER, [5 * 8, 1, 1]),
        "merged on store": (POINTER, [18 * 8, 1, 1]),
    }
    if arch == "sm_90":
        expected |= {
            "pointer pdl": (POINTER, [18 * 8, 1, 1]),
            "tma cropped": (TMA, [6 * 8, 1, 1]),
            "tma dense": (TMA, [3 * 8, 1, 1]),
            "swap_ab": (SWAP_AB, [2 * 8, 1, 1]),
            "swap_ab split K": (SWAP_AB, [2 * 8, 4, 1]),
        }
    for name, (kernel, grid) in expected.items():
        [launch] = found[name][-1]["launches"]
        assert (launch["kernel"], launch["grid"], launch["threads"]) == (kernel, grid, 128), name
    for name, turns in found.items():
        assert all((PROGRAMMATIC in turn["launches"][0]["attributes"]) == ("pdl" in name) for turn in turns), name


@pytest.mark.parametrize(("what", "words"), [("too large", "OutOfResources: "), ("refused", "Refused: the driver")])
def test_what_the_launcher_raises_is_recognised(ask, what, words):
    """configs/test_fallback.py has what follows from it."""
    error, launches = ask("sm_90", "errors")[what]
    assert error.startswith(words)
    assert launches == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_selected_at_first_use_is_what_runs(ask, arch):
    """Every candidate is launched twice, to check and to time it; then each call is one launch, as if it was named."""
    answer = ask(arch, "first_use")
    captured, first, second, third, named = answer["calls"]
    assert len(captured) == 1, "nothing is selected while a graph is captured"
    assert len(first) == 2 * answer["candidates"] + 1
    assert first[-1:] == second == third == named
    assert answer["ready"] == 2, "the captured call is not kept"
