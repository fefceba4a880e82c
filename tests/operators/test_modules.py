"""If this fails, one of the three modules, or a gradient of it, differs from its reference on the torch path, or their
state dicts do."""

import pytest
import torch
from support.compare import compare_modules, twins
from support.modules import EACH_MODULE, build, draw, flat, same_state

import reference
import stf_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])

# name, arguments, options, grid
CASES = {
    "mbtf": ("MultiBlockTokenFusion", (3, 16), {}, (3, 4)),
    "mbtf-widths": ("MultiBlockTokenFusion", (2, 10), {"hidden_dim": 30, "out_dim": 17}, (3, 4)),
    "mbtf-no-bias-silu": ("MultiBlockTokenFusion", (4, 8), {"bias": False, "activation": "silu"}, (3, 4)),
    "mbtf-one-block-skip": ("MultiBlockTokenFusion", (1, 16), {"skip_tokens": 1}, (3, 4)),
    "mbtf-linear": ("MultiBlockTokenFusion", (2, 16), {"activation": None}, (3, 4)),
    "stf": ("SpatialTokenFusion", (8, 24), {}, None),
    "stf-r3-tall": ("SpatialTokenFusion", (6, 20), {"merge_size": 3, "hidden_dim": 40}, (6, 3)),
    "stf-truncated": ("SpatialTokenFusion", (8, 24), {"truncate": True, "activation": "gelu_tanh"}, (5, 7)),
    "stf-no-bias": ("SpatialTokenFusion", (8, 24), {"bias": False}, (2, 6)),
    "stf-r1": ("SpatialTokenFusion", (8, 24), {"merge_size": 1}, None),
    "projector": ("CompactTokenProjector", (3, 8, 20), {}, None),
    "class-token": ("CompactTokenProjector", (4, 8, 20), {"skip_tokens": 1}, (4, 6)),
    "truncated": ("CompactTokenProjector", (2, 8, 20), {"truncate": True, "skip_tokens": 1}, (5, 7)),
    "no-bias": ("CompactTokenProjector", (3, 8, 20), {"bias": False}, None),
    "r3-no-bias-silu": (
        "CompactTokenProjector",
        (2, 6, 20),
        {"merge_size": 3, "bias": False, "activation": "silu"},
        (3, 6),
    ),
    "gelu-tanh": ("CompactTokenProjector", (3, 8, 20), {"activation": "gelu_tanh"}, None),
    "linear": ("CompactTokenProjector", (3, 8, 20), {"activation": None}, None),
    "r1": ("CompactTokenProjector", (3, 8, 20), {"merge_size": 1}, (3, 5)),
    "r3-truncated": ("CompactTokenProjector", (3, 8, 20), {"merge_size": 3, "truncate": True}, (4, 7)),
    "stf-alone": ("CompactTokenProjector", (1, 8, 20), {"mbtf": False, "skip_tokens": 1}, None),
    "widths": ("CompactTokenProjector", (3, 8, 20), {"mbtf_hidden_dim": 11, "stf_hidden_dim": 23}, None),
    "thirty-two-blocks": ("CompactTokenProjector", (32, 4, 20), {}, (2, 4)),
}


@DTYPES
@TRAINING
@pytest.mark.parametrize(("name", "args", "options", "grid"), CASES.values(), ids=CASES)
def test_against_the_reference(name, args, options, grid, training, dtype):
    modules = twins(name, *args, **options, dtype=dtype)
    height, width = grid or (4, 4)
    count, dim = (1, args[0]) if name == "SpatialTokenFusion" else args[:2]
    blocks = [torch.randn(2, height * width + options.get("skip_tokens", 0), dim) for _ in range(count)]
    for module in modules:
        module.train(training).requires_grad_(training)

    def call(module, blocks):
        if name == "MultiBlockTokenFusion":
            return module(blocks)
        return module(blocks[0] if name == "SpatialTokenFusion" else blocks, grid)

    with torch.set_grad_enabled(training):
        y = compare_modules(modules, blocks, dtype, call, gradients=training)
        again = call(modules[0], [block.to(dtype) for block in blocks])
    assert torch.equal(again, y)


@EACH_MODULE
def test_an_empty_batch_has_gradients_of_zero(name):
    """A rank of a data-parallel run without an image still has to take part in the reduction."""
    ours, theirs = same_state(name)
    x = draw(name, batch=0, requires_grad=True)
    y, expected = ours(x), theirs(x)
    assert y.shape == expected.shape
    y.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (*flat(x), *ours.parameters()))


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


@EACH_MODULE
def test_dtype_and_device_arguments(name):
    module = build(name, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}
    assert torch.nn.Module.extra_repr(module) != module.extra_repr()  # says something of its own
