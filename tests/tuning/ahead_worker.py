"""Compile configurations ahead on a driver that only names its GPU, then say which of them a launch would find.

Prints one JSON line: {"first": what was compiled, "again": that, after the same once more}. A launch would fail here,
for want of a GPU.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError

from stf_kernels.ops.compile_ahead import compiling_ahead
from stf_kernels.ops.launch import launch_stage
from stf_kernels.ops.stage import Stage
from stf_kernels.tuning import GemmConfig


class Driver:
    """What the JIT asks of a driver before it launches."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    blocks, weight = [torch.randn(1, 64, 64).half() for _ in range(2)], torch.randn(64, 128).half()
    fits = [GemmConfig(64, 64, 32, num_stages=stages) for stages in (2, 3, 4)]
    broken = GemmConfig(2048, 1024, 32)  # more elements than a tensor of Triton has: it does not compile
    compiled, original = [], triton.compiler.compile

    def noting(*args, **options):
        try:
            code = original(*args, **options)
        except CompilationError:
            compiled.append("failed")
            raise
        compiled.append(code.metadata.target.arch)
        return code

    triton.compiler.compile = noting  # the JIT takes it from there at its first launch
    counts = []
    for _ in range(2):
        with compiling_ahead(2):
            for config in (*fits, broken):
                launch_stage(blocks, weight, None, Stage("gelu"), config)
        counts.append(sorted(map(str, compiled)))
    print(json.dumps({"first": counts[0], "again": counts[1]}))


if __name__ == "__main__":
    main()
