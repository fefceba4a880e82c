"""If this fails, a path for Hopper and later is wrong on this GPU, or its driver refuses what the path is built on.

None of these paths is a default; a failure here costs a speed-up and no result.
"""

import pytest
import torch
from support.rule import assert_within_rule

import stf_kernels
from stf_kernels.ops import forms
from stf_kernels.ops.launch import run_stage
from stf_kernels.ops.segments import Stage
from stf_kernels.configs import GemmConfig
from stf_kernels.configs.model import tma_tiles, swap_ab_tiles

HOPPER = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="TMA and dependent launches: NVIDIA from sm_90 on"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def no_pointers(monkeypatch):
    """A launch that falls back to the portable kernel would prove nothing."""

    def refuse(self, config):
        raise AssertionError(f"{config} fell back to pointers")

    monkeypatch.setattr(forms.Call, "_by_pointers", refuse)


def check(blocks, n, stage, config):
    k = len(blocks) * blocks[0].shape[-1]
    weight = torch.randn(n, k, device="cuda").to(blocks[0].dtype) / k**0.5
    bias = torch.randn(n, device="cuda").to(blocks[0].dtype)
    joined = torch.cat(blocks, -1)

    def run(to):
        y = torch.nn.functional.linear(joined.to(to), weight.to(to), bias.to(to))
        return torch.nn.functional.gelu(y) if stage.activation else y

    same, exact = run(joined.dtype), run(torch.float64)
    for _ in range(2):  # split K leaves its counters at zero
        assert_within_rule(str(config), run_stage(blocks, weight, bias, stage, config)[0], same, exact)


@DTYPES
@pytest.mark.parametrize("config", tma_tiles("sm_90", 2), ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_descriptor_over_all_blocks(no_pointers, config, dtype, batch):
    """Eight separate allocations: the first thing to settle is whether the driver takes their descriptor."""
    blocks = [torch.randn(batch, 577, 256, device="cuda").to(dtype)[:, 1:] for _ in range(8)]
    check(blocks, 520, Stage("gelu"), config)


@DTYPES
@pytest.mark.parametrize("config", [*tma_tiles("sm_90", 2), *swap_ab_tiles("sm_90", 2)], ids=str)
@pytest.mark.parametrize(("batch", "c", "n"), [(1, 4096, 1000), (3, 1024, 520)])
def test_dense_rows(no_pointers, config, dtype, batch, c, n):
    check([torch.randn(batch, 144, c, device="cuda").to(dtype)], n, Stage("gelu"), config)


@pytest.mark.parametrize("direct", ["0", "1"], ids=["jit", "direct"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_dependent_launches_give_the_same_bits(monkeypatch, backend, direct):
    """Each stage reads what the one before has just written: a wait too few shows as other bits."""
    torch.manual_seed(3)
    module = stf_kernels.CompactTokenProjector(4, 256, 512, skip_tokens=1, dtype=torch.bfloat16, device="cuda")
    module.requires_grad_(False)
    blocks = [torch.randn(1, 65, 256, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    monkeypatch.setenv("STF_KERNELS_DIRECT_LAUNCH", direct)
    with stf_kernels.use_backend(backend), torch.no_grad():
        expected = module(blocks)
        monkeypatch.setenv("STF_KERNELS_PDL", "1")
        found = [module(blocks) for _ in range(50)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = module(blocks)
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in (*found, captured))


@pytest.mark.parametrize("direct", ["0", "1"], ids=["jit", "direct"])
def test_dependent_split_k(no_pointers, monkeypatch, direct):
    """Workspace and counters pass from one launch to the next."""
    config = GemmConfig(128, 128, 64, num_warps=8, num_stages=4, split_k=4, form="swap_ab", tail_m=16)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    x = torch.randn(1, 144, 4096, device="cuda", dtype=torch.bfloat16)

    def chain(y):
        for _ in range(20):
            y, _ = run_stage([y], weight, None, Stage("gelu"), config)
        return y

    expected = chain(x)
    monkeypatch.setenv("STF_KERNELS_DIRECT_LAUNCH", direct)
    monkeypatch.setenv("STF_KERNELS_PDL", "1")
    assert torch.equal(chain(x), expected)
    assert torch.equal(chain(x), expected)  # now past the JIT
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x)
    graph.replay()
    assert torch.equal(captured, expected)
