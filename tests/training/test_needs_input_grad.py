"""If this fails, a frozen tower pays for dX or a frozen projector for dW: matrix products whose result nobody reads."""

import pytest
import torch
from support.recording import Recorder

import stf_kernels

COUNT, DIM = 3, 8


def step(
    *, blocks=False, layers=("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2"), dtype=torch.float32
):
    """The recorded backward of one projector step in which the named layers and perhaps the blocks are trained."""
    module = stf_kernels.CompactTokenProjector(COUNT, DIM, 20, dtype=dtype)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in layers)
    inputs = [torch.randn(2, 16, DIM, dtype=dtype, requires_grad=blocks) for _ in range(COUNT)]
    y = module(inputs)
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == (name.rpartition(".")[0] in layers), name
    assert all((x.grad is not None) == blocks for x in inputs)
    return recorder


DX_BLOCKS = DW_FIRST = COUNT  # one product a segment

CASES = {
    # layers trained, blocks trained -> products of the backward
    "all": (("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2"), True, DX_BLOCKS + DW_FIRST + 3 + 3),
    "frozen-tower": (("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2"), False, DW_FIRST + 3 + 3),
    "frozen-projector": ((), True, DX_BLOCKS + 3),
    "last-layer-only": (("stf.linear_2",), False, 1),
    "stf-only": (("stf.linear_1", "stf.linear_2"), False, 2 + 1),
    "third-layer-only": (("stf.linear_1",), False, 1 + 1),
    "first-layer-only": (("mbtf.linear_1",), False, DW_FIRST + 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("layers", "blocks", "products"), CASES.values(), ids=CASES)
def test_products_of_the_backward(layers, blocks, products, dtype):
    assert step(layers=layers, blocks=blocks, dtype=dtype).matrix_products() == products


def test_only_one_block_is_trained():
    module = stf_kernels.CompactTokenProjector(COUNT, DIM, 20).requires_grad_(False)
    inputs = [torch.randn(2, 16, DIM, requires_grad=i == 1) for i in range(COUNT)]
    y = module(inputs)
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    assert recorder.matrix_products() == 1 + 3
    assert [x.grad is not None for x in inputs] == [False, True, False]


@pytest.mark.parametrize("trained", ["weight", "bias", "x"])
def test_one_operand_of_a_merge(trained):
    operands = {"x": torch.randn(2, 16, DIM), "weight": torch.randn(5, 4 * DIM), "bias": torch.randn(5)}
    operands[trained].requires_grad_()
    y = stf_kernels.spatial_merge_linear(**operands, grid=(4, 4), activation="gelu")
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    assert recorder.matrix_products() == {"weight": 4, "bias": 0, "x": 4}[trained]
    assert [name for name, t in operands.items() if t.grad is not None] == [trained]


def test_a_bias_alone_needs_no_activated_copy():
    module = stf_kernels.CompactTokenProjector(COUNT, DIM, 20).requires_grad_(False)
    module.stf.linear_2.bias.requires_grad_()
    y = module([torch.randn(2, 16, DIM)] * COUNT)
    with Recorder() as recorder:
        y.backward(torch.ones_like(y))
    assert recorder.matrix_products() == 0
    assert not any("gelu" in name for name in recorder.calls)


def test_nothing_is_kept_without_a_gradient():
    module = stf_kernels.CompactTokenProjector(COUNT, DIM, 20)
    blocks = [torch.randn(2, 16, DIM)] * COUNT
    with Recorder() as with_grad:
        module(blocks)
    with Recorder() as without, torch.no_grad():
        assert not module(blocks).requires_grad
    # a kept pre-activation is not overwritten by its activation
    assert (with_grad.calls["gelu"], with_grad.calls["gelu_"]) == (2, 0)
    assert (without.calls["gelu"], without.calls["gelu_"]) == (0, 2)


@pytest.mark.parametrize("trained", ["blocks", "weights"])
def test_through_the_dispatcher(trained):
    blocks = [torch.randn(2, 4, DIM, requires_grad=trained == "blocks") for _ in range(COUNT)]
    weight = torch.randn(5, COUNT * DIM, requires_grad=trained == "weights")
    needs = [tensor.requires_grad for tensor in (*blocks, weight)]
    y = torch.ops.stf_kernels.concat_linear(blocks, [weight], [], "gelu", 0, 1, 0, 0, needs)[0]
    # a dispatch mode does not look into a custom operator; the profiler does
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward(torch.ones_like(y))
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == COUNT
