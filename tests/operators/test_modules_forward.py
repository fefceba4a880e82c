"""If this fails, one of the three modules differs from its reference on the torch path, or their state dicts do."""

import pytest
import torch
from support.compare import compare_modules, twins

import reference
import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)

FUSION = {  # constructor options of MultiBlockTokenFusion(num_blocks, dim)
    "defaults": (3, 16, {}),
    "widths": (2, 10, {"hidden_dim": 30, "out_dim": 17}),
    "no-bias-silu": (4, 8, {"bias": False, "activation": "silu"}),
    "one-block-skip": (1, 16, {"skip_tokens": 1}),
    "linear": (2, 16, {"activation": None}),
}

MERGING = {  # SpatialTokenFusion(dim, out_dim), grid
    "defaults": (8, 24, {}, None),
    "r3-tall": (6, 20, {"merge_size": 3, "hidden_dim": 40}, (6, 3)),
    "truncated": (8, 24, {"truncate": True, "activation": "gelu_tanh"}, (5, 7)),
    "no-bias": (8, 24, {"bias": False}, (2, 6)),
    "r1": (8, 24, {"merge_size": 1}, None),
}

PROJECTOR = {  # CompactTokenProjector(num_blocks, dim, out_dim), grid
    "defaults": (3, 8, 20, {}, None),
    "class-token": (4, 8, 20, {"skip_tokens": 1}, (4, 6)),
    "truncated": (2, 8, 20, {"truncate": True, "skip_tokens": 1}, (5, 7)),
    "r3-no-bias": (2, 6, 20, {"merge_size": 3, "bias": False, "activation": "silu"}, (3, 6)),
    "r1": (3, 8, 20, {"merge_size": 1}, (3, 5)),
    "stf-alone": (1, 8, 20, {"mbtf": False, "skip_tokens": 1}, (4, 4)),
    "widths": (3, 8, 20, {"mbtf_hidden_dim": 11, "stf_hidden_dim": 23}, (4, 4)),
    "linear": (3, 8, 20, {"activation": None}, (4, 4)),
    "thirty-two-blocks": (32, 4, 20, {}, (2, 4)),
}


@DTYPES
@pytest.mark.parametrize(("count", "dim", "options"), FUSION.values(), ids=FUSION)
def test_multi_block_token_fusion(count, dim, options, dtype):
    classes = stf_kernels.MultiBlockTokenFusion, reference.MultiBlockTokenFusion
    blocks = [torch.randn(2, 11, dim) for _ in range(count)]
    compare_modules(twins(*classes, count, dim, **options, dtype=dtype), blocks, dtype)


@DTYPES
@pytest.mark.parametrize(("dim", "out_dim", "options", "grid"), MERGING.values(), ids=MERGING)
def test_spatial_token_fusion(dim, out_dim, options, grid, dtype):
    classes = stf_kernels.SpatialTokenFusion, reference.SpatialTokenFusion
    height, width = grid or (4, 4)
    x = torch.randn(2, height * width, dim)
    modules = twins(*classes, dim, out_dim, **options, dtype=dtype)
    compare_modules(modules, [x], dtype, lambda module, blocks: module(blocks[0], grid))


@DTYPES
@pytest.mark.parametrize(("count", "dim", "out_dim", "options", "grid"), PROJECTOR.values(), ids=PROJECTOR)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compact_token_projector(count, dim, out_dim, options, grid, training, dtype):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    height, width = grid or (4, 4)
    blocks = [torch.randn(2, height * width + options.get("skip_tokens", 0), dim) for _ in range(count)]
    modules = twins(*classes, count, dim, out_dim, **options, dtype=dtype)
    for module in modules:
        module.train(training).requires_grad_(training)
    with torch.set_grad_enabled(training):
        y = compare_modules(modules, blocks, dtype, lambda module, blocks: module(blocks, grid))
        if not training:  # once more, from whatever was cached
            again = modules[0]([block.to(dtype) for block in blocks], grid)
            assert torch.equal(again, y)


@DTYPES
def test_cropped_views_of_hidden_states(dtype):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    modules = twins(*classes, 3, 8, 20, dtype=dtype)
    hidden = [torch.randn(2, 17, 8) for _ in range(3)]
    compare_modules(modules, hidden, dtype, lambda module, states: module([state[:, 1:] for state in states]))


@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch(batch):
    classes = stf_kernels.CompactTokenProjector, reference.CompactTokenProjector
    modules = twins(*classes, 3, 8, 20, dtype=torch.float32)
    y = compare_modules(modules, [torch.randn(batch, 16, 8)] * 3, torch.float32)
    assert y.shape == (batch, 4, 20)


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("MultiBlockTokenFusion", (3, 8), {"hidden_dim": 5, "out_dim": 7, "bias": False}),
        ("SpatialTokenFusion", (8, 9), {"merge_size": 3}),
        ("CompactTokenProjector", (3, 8, 9), {"mbtf_hidden_dim": 12, "stf_hidden_dim": 30}),
        ("CompactTokenProjector", (1, 8, 9), {"mbtf": False}),
    ],
)
def test_state_dicts_go_both_ways(name, args, options):
    ours, theirs = getattr(stf_kernels, name)(*args, **options), getattr(reference, name)(*args, **options)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}
    ours.load_state_dict(other)
    assert all(torch.equal(value, other[key]) for key, value in ours.state_dict().items())
    theirs.load_state_dict({key: value + 1 for key, value in mine.items()})
    assert [type(p) for p in ours.parameters()] == [torch.nn.Parameter] * len(other)


def test_dtype_and_device_arguments():
    module = stf_kernels.CompactTokenProjector(2, 4, 5, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}
    assert torch.nn.Module.extra_repr(module) != module.extra_repr()  # says something of its own
