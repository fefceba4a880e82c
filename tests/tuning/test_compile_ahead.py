"""If these fail, a search compiles one configuration after the other, or a launch does not find what was compiled."""

import json

from support.processes import python

from stf_kernels.ops import direct_launch
from stf_kernels.ops.compile_ahead import compiling_ahead, is_compiling_ahead


def test_all_are_compiled_once_and_nothing_is_launched(tmp_path):
    """In a process of its own, on a driver that only names its GPU: a launch would fail."""
    done = python("tests/tuning/ahead_worker.py", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["first"] == ["90", "90", "90", "failed"]
    assert found["again"].count("90") == 3, "the JIT does not find what was compiled ahead"


class Kernel:
    def __init__(self) -> None:
        self.warmed, self.launched = [], []

    def warmup(self, *arguments, grid, **options):
        self.warmed.append((arguments, grid, options))

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((arguments, grid, options))


def test_a_launch_compiles_with_its_own_arguments_and_launches_again_behind_the_block(monkeypatch):
    monkeypatch.setattr(direct_launch, "enabled", lambda: False)
    kernel = Kernel()
    call = (kernel, (3, 2), (1, None), {"BLOCK": 16})
    with compiling_ahead(1):
        direct_launch.launch(*call, num_warps=8)
    direct_launch.launch(*call, num_warps=8)
    assert kernel.warmed == kernel.launched == [((1, None), (3, 2), {"BLOCK": 16, "num_warps": 8})]


def test_an_error_inside_the_block_ends_the_mode():
    try:
        with compiling_ahead(1):
            raise KeyError
    except KeyError:
        pass
    assert not is_compiling_ahead()
