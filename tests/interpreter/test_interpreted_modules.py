"""If this fails, the chain of kernels (merged stores, dense reads, scatter) or its backward is wrong."""

import traceback
from pathlib import Path

import pytest
import torch
from support.compare import compare_modules, twins
from support.rule import assert_within_rule

import reference
import stf_kernels
from stf_kernels.ops import launch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

CASES = {
    "defaults": ({}, (4, 4)),
    "class-token-wide": ({"skip_tokens": 1}, (2, 6)),
    "truncated": ({"truncate": True, "skip_tokens": 1, "activation": "silu"}, (5, 7)),
    "r3-no-bias": ({"merge_size": 3, "bias": False}, (3, 6)),
    "r1-tanh": ({"merge_size": 1, "activation": "gelu_tanh"}, (3, 5)),
    "r4": ({"merge_size": 4, "stf_hidden_dim": 40}, (4, 8)),
    "no-activation": ({"activation": None}, (4, 6)),
    "widths": ({"mbtf_hidden_dim": 33, "stf_hidden_dim": 37}, (4, 4)),
}


@DTYPES
@pytest.mark.parametrize(("options", "grid"), CASES.values(), ids=CASES)
def test_projector(options, grid, dtype):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    modules = twins(*classes, 3, 17, 20, **{"stf_hidden_dim": 40, **options}, dtype=dtype)
    blocks = [torch.randn(2, grid[0] * grid[1] + options.get("skip_tokens", 0), 17) for _ in range(3)]
    compare_modules(modules, blocks, dtype, lambda module, x: module(x, grid), gradients=True)


@DTYPES
def test_the_children(dtype):
    fusion = twins(stf_kernels.MultiBlockTokenFusion, reference.MultiBlockTokenFusion, 3, 8, skip_tokens=1, dtype=dtype)
    compare_modules(fusion, [torch.randn(2, 12, 8) for _ in range(3)], dtype, gradients=True)
    merging = twins(stf_kernels.SpatialTokenFusion, reference.SpatialTokenFusion, 8, 20, hidden_dim=40, dtype=dtype)
    x = [torch.randn(2, 24, 8)]
    compare_modules(merging, x, dtype, lambda module, blocks: module(blocks[0], (4, 6)), gradients=True)


@DTYPES
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch, dtype):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    modules = twins(*classes, 2, 8, 20, dtype=dtype)
    compare_modules(modules, [torch.randn(batch, 16, 8) for _ in range(2)], dtype, gradients=True)


@DTYPES
@pytest.mark.parametrize("strided", [False, True])
def test_scatter(strided, dtype):
    modules = twins(stf_kernels.CompactTokenProjector, reference.CompactTokenProjector, 2, 8, 20, dtype=dtype)
    ours, same, exact = (module.requires_grad_(False) for module in modules)
    blocks = [torch.randn(2, 16, 8).to(dtype) for _ in range(2)]
    rows = torch.randperm(13)[:8]
    out = torch.randn(13, 30).to(dtype)[:, 4:24]
    before = out.clone()
    if strided:
        rows = torch.stack([rows, rows.flip(0)], 1).flatten()[::2]
    assert ours(blocks, out=out, rows=rows) is out
    expected = exact([block.double() for block in blocks]).flatten(0, 1)
    assert_within_rule("scattered", out[rows], same(blocks).flatten(0, 1), expected)
    others = torch.ones(13, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(out[others], before[others])


def test_two_runs_give_the_same_bits():
    module = stf_kernels.CompactTokenProjector(2, 8, 20)
    blocks = [torch.randn(2, 16, 8, requires_grad=True) for _ in range(2)]
    leaves, runs = [*blocks, *module.parameters()], []
    for _ in range(2):
        y = module(blocks)
        runs.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_saved_tensors_that_come_back_in_another_layout():
    """As a hook that compresses or offloads them may return them: same values, other strides."""
    module = stf_kernels.CompactTokenProjector(2, 8, 20)
    blocks, parameters = [torch.randn(2, 16, 8) for _ in range(2)], list(module.parameters())
    expected = torch.autograd.grad(module(blocks).square().sum(), parameters)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().mT.contiguous(), lambda t: t.mT):
        y = module(blocks)
    for mine, exact in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.fixture
def launched(monkeypatch):
    """Of each launch, the functions of stf_kernels that stood on the stack, outermost first."""
    found = []

    def note(function):
        def noted(*arguments, **options):
            stack = [frame for frame in traceback.extract_stack() if "stf_kernels" in Path(frame.filename).parts]
            found.append([f"{Path(frame.filename).stem}.{frame.name}" for frame in stack])
            return function(*arguments, **options)

        return noted

    monkeypatch.setitem(launch.ARGUMENTS, "pointer", note(launch.ARGUMENTS["pointer"]))
    monkeypatch.setattr(launch, "run_activation_bwd", note(launch.run_activation_bwd))
    return found


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_path_to_a_launch_is_short_and_ends_in_a_kernel(launched, grad):
    """Else every comparison here would be torch with torch, or the host would cost more than the GPU."""
    module = stf_kernels.CompactTokenProjector(2, 8, 20)
    blocks = [torch.randn(1, 16, 8) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        y = module(blocks)
    assert [path[0] for path in launched] == ["modules.forward"] * 4
    assert [path[-1] for path in launched] == ["launch.run_stage"] * 4
    assert max(map(len, launched)) <= 6, launched[0]
    launched.clear()
    with torch.set_grad_enabled(grad):
        stf_kernels.concat_linear(blocks, torch.randn(5, 16, requires_grad=True))
    assert launched[0][0] == "functional.concat_linear"
    assert len(launched[0]) <= 5, launched[0]
    launched.clear()
    if grad:
        y.sum().backward()
        assert [path[-1] for path in launched] == ["backward.through"] * 2


def test_compiled_and_bad_input():
    """torch.compile reaches the same kernels; a wrong `out` is refused before one runs."""
    module = stf_kernels.CompactTokenProjector(2, 8, 20).requires_grad_(False)
    blocks = [torch.randn(1, 16, 8) for _ in range(2)]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(blocks), module(blocks))
    out = torch.zeros(3, 20)
    with pytest.raises(ValueError, match=r"rows.*0 to 2.*3"):
        module(blocks, out=out, rows=torch.arange(4))
    assert not out.any()
