"""If this fails, mixed precision gives another dtype, or other values, than nn.Linear does under the same autocast."""

import pytest
import torch
from support.rule import assert_within_rule
from torch import nn

import reference
import stf_kernels

CASTS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def modules(name):
    args = {"MultiBlockTokenFusion": (3, 8), "SpatialTokenFusion": (8, 20), "CompactTokenProjector": (3, 8, 20)}[name]
    ours, theirs = getattr(stf_kernels, name)(*args), getattr(reference, name)(*args)
    ours.load_state_dict(theirs.state_dict())
    x = [torch.randn(2, 16, 8) for _ in range(3)]
    return ours, theirs, (x[0] if name == "SpatialTokenFusion" else x)


@CASTS
@pytest.mark.parametrize("name", ["MultiBlockTokenFusion", "SpatialTokenFusion", "CompactTokenProjector"])
def test_modules(name, dtype):
    ours, theirs, x = modules(name)
    with torch.autocast("cpu", dtype):
        y, same = ours(x), theirs(x)
        assert y.dtype == nn.Linear(8, 8)(torch.randn(2, 8)).dtype == dtype
    exact = theirs.double()([t.double() for t in x] if isinstance(x, list) else x.double()).detach()
    assert_within_rule("output", y.detach(), same.detach(), exact)
    theirs.float()
    y.float().sum().backward()
    same.float().sum().backward()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32, key  # the parameters', as autocast leaves them
        assert (mine.grad - other.grad).norm() <= 0.05 * other.grad.norm(), key


@CASTS
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_functions_follow_nn_linear_for_every_input_dtype(source, dtype):
    layer = nn.Linear(16, 5).to(source)
    blocks = [torch.randn(2, 4, 8).to(source) for _ in range(2)]
    joined = torch.cat(blocks, -1)  # under autocast torch.cat refuses two 16-bit types
    with torch.autocast("cpu", dtype):
        expected = layer(joined)
        y = stf_kernels.concat_linear(blocks, layer.weight, layer.bias)
        merged = stf_kernels.spatial_merge_linear(blocks[0], torch.randn(5, 32).to(source), layer.bias, grid=(2, 2))
    assert y.dtype == merged.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_mixed_operands_agree_as_they_do_for_nn_linear():
    """fp32 master weights and bf16 activations: an error without autocast, ordinary with it."""
    blocks, weight = [torch.randn(2, 5, 8).bfloat16()] * 2, torch.randn(5, 16)
    with pytest.raises(TypeError, match="dtype"):
        stf_kernels.concat_linear(blocks, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert stf_kernels.concat_linear(blocks, weight).dtype == torch.bfloat16
        projector = stf_kernels.CompactTokenProjector(2, 8, 5, skip_tokens=1)
        assert projector(blocks).dtype == torch.bfloat16


def test_off_and_nested():
    ours, _, x = modules("CompactTokenProjector")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert ours(x).dtype == torch.float32
        assert ours(x).dtype == torch.bfloat16
    assert ours(x).dtype == torch.float32


@pytest.mark.parametrize("layer", ["mbtf.linear_1", "stf.linear_2"])
def test_a_wrapped_layer_under_autocast(layer):
    ours, theirs, x = modules("CompactTokenProjector")
    ours.get_submodule(layer).register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        y, same = ours(x), theirs(x)
    assert y.dtype == torch.bfloat16
    exact = theirs.double()([t.double() for t in x])
    assert_within_rule("output", y.detach(), same.detach(), exact.detach())
