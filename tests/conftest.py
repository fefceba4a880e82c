"""What every test shares: the checkout on the path, one random seed a test, and who runs where.

tests/clients is left out (norecursedirs): a client has an environment and a make target of its own, which names its
folder. tests/interpreter needs TRITON_INTERPRET=1 before the kernels are imported, so it is a process of its own. Two
folders may skip: tests/gpu without a GPU that Triton serves, and tests/launch without a C compiler.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # plain `pytest` does not put the checkout there
torch.set_num_threads(1)  # what is this small waits for a second one several times longer than the work takes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
os.environ.pop("STF_KERNELS_BACKEND", None)  # the tests choose the backend themselves
os.environ["STF_KERNELS_SELECT"] = "off"  # and what is selected
os.environ["STF_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), "stf_kernels-no-cache")

# What takes long, by the beginning of a test's name: run last, and left out of `make test-quick`.
SLOW = (
    "tests/aot/",
    "tests/bench/",
    "tests/convert/test_convert_folder.py",
    "tests/convert/test_convert_tiles.py",
    "tests/learn/",
    "tests/llava/test_llava_loading.py",
    "tests/llava/test_llava_save_load.py",
    "tests/operators/test_attack.py",
    "tests/project/test_commands.py",
    "tests/training/test_compile.py",
    "tests/training/test_long_runs.py",
    "tests/project/test_examples.py",
)

# The interpreter's kernels cannot be had without the variable; `make test-browser` installs Chromium first.
collect_ignore = [] if INTERPRETED else ["interpreter"]
collect_ignore += [] if os.environ.get("STF_BROWSER_TESTS") == "1" else ["browser"]


def pytest_report_header(config: pytest.Config) -> list[str]:
    if INTERPRETED:
        return ["stf_kernels: Triton kernels run in the interpreter (TRITON_INTERPRET=1)"]
    return ["stf_kernels: tests/interpreter is a run of its own: TRITON_INTERPRET=1 python -m pytest tests/interpreter"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if item.nodeid.startswith(SLOW)]
    for item in slow:
        item.add_marker(pytest.mark.slow)
    items.sort(key=slow.__contains__)
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needing_gpu:
        from stf_kernels.backend import triton_serves

        if not torch.cuda.is_available() or not triton_serves(torch.device("cuda", torch.cuda.current_device())):
            for item in needing_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU that Triton serves"))


# Where torch.empty holds NaN, so that an element nobody wrote is seen.
POISONED = ("tests/operators/", "tests/training/", "tests/interpreter/")


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(request: pytest.FixtureRequest):
    torch.manual_seed(20260707)
    if not request.node.nodeid.startswith(POISONED):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
