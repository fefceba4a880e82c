"""If this fails, a kernel of some tile or form is wrong on this GPU, or its driver refuses what the form is built on.

Split K, the forms with descriptors and dependent launches are no defaults: where they fail, a failure costs a speed-up
and no result.
"""

from dataclasses import replace

import pytest
import torch
from support.stages import compare, compare_indexed, tower

import stf_kernels
from stf_kernels import configs
from stf_kernels.configs import GemmConfig, device_identity
from stf_kernels.configs.model import has_tma, others, tiles
from stf_kernels.ops import launch
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]
ARCH = device_identity(torch.cuda.current_device())[1] if torch.cuda.is_available() else "sm_90"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TMA = [config for config in others(ARCH, 2) if config.form == "tma"]
SWAP_AB = [config for config in others(ARCH, 2) if config.form == "swap_ab"]
needs_tma = pytest.mark.skipif(not has_tma(ARCH, 2), reason="TMA and dependent launches: NVIDIA from sm_90 on")


@DTYPES
def test_every_tile_at_a_size_with_tails(dtype):
    for config in (*tiles(ARCH, dtype.itemsize), *others(ARCH, dtype.itemsize)):
        if config.form == "pointer":
            for _ in range(2):  # split K counts from zero each time
                compare(config, Stage(), tower(3, 3, 77, 200, dtype, device="cuda"), 300, save_pre=False)


@pytest.mark.parametrize("config", [tiles(ARCH, 2)[0], *TMA[:1], *SWAP_AB[:1]], ids=str)
def test_rows_outside_out_are_not_written(config):
    compare_indexed(config, tower(1, 1, 144, 256, torch.bfloat16, skip=0, device="cuda"), 300)


@needs_tma
@HALF
@pytest.mark.parametrize("config", TMA, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_descriptor_over_all_blocks(config, dtype, batch):
    """Eight separate allocations: the first thing to settle is whether the driver takes their descriptor."""
    blocks = [torch.randn(batch, 577, 256, device="cuda").to(dtype)[:, 1:] for _ in range(8)]
    compare(config, Stage("gelu"), blocks, 520, save_pre=False)


@needs_tma
@HALF
@pytest.mark.parametrize("config", [*TMA, *SWAP_AB], ids=str)
@pytest.mark.parametrize(("batch", "c", "n"), [(1, 4096, 1000), (3, 1024, 520)])
def test_dense_rows(config, dtype, batch, c, n):
    for _ in range(2):
        compare(config, Stage("gelu"), tower(1, batch, 144, c, dtype, skip=0, device="cuda"), n, save_pre=False)


@needs_tma
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_dependent_launches_give_the_same_bits(monkeypatch, backend):
    """Each stage reads what the one before has just written: a wait too few shows as other bits."""
    torch.manual_seed(3)
    module = stf_kernels.CompactTokenProjector(4, 256, 512, skip_tokens=1, dtype=torch.bfloat16, device="cuda")
    module.requires_grad_(False)
    blocks = [torch.randn(1, 65, 256, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    with stf_kernels.use_backend(backend), torch.no_grad():
        expected, choose = module(blocks), configs.choose
        monkeypatch.setattr(launch, "_ready", {})
        monkeypatch.setattr(launch, "_chosen", {})

        def dependent(*what, **options):
            config, settled = choose(*what, **options)
            return config and replace(config, pdl=True), settled

        monkeypatch.setattr(configs, "choose", dependent)
        found = [module(blocks) for _ in range(50)]
        graph, captured = captured_call(lambda: module(blocks))
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in (*found, captured))


@needs_tma
def test_dependent_split_k():
    """Parts and counters of one launch beside those of the next."""
    config = GemmConfig(128, 128, 64, num_warps=8, num_stages=4, split_k=4, form="swap_ab", tail_m=16)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    x = torch.randn(1, 144, 4096, device="cuda", dtype=torch.bfloat16)

    def chain(config):
        y = x
        for _ in range(20):
            y, _ = run_stage([y], weight, None, Stage("gelu"), config)
        return y

    expected, dependent = chain(config), replace(config, pdl=True)
    assert torch.equal(chain(dependent), expected)
    graph, captured = captured_call(lambda: chain(dependent))
    graph.replay()
    assert torch.equal(captured, expected)


def captured_call(call):
    """(a graph of the call, its result)."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        return graph, call()
