"""If this fails, mixed precision gives another dtype, or other values, than nn.Linear does under the same autocast."""

import pytest
import torch
from support.compare import twins
from support.modules import ARGUMENTS, EACH_MODULE, build, draw
from support.rule import assert_within_rule
from torch import nn

import stf_kernels

HALF = [torch.bfloat16, torch.float16]
CASTS = pytest.mark.parametrize("dtype", HALF, ids=str)


@CASTS
@EACH_MODULE
@pytest.mark.parametrize("hooked", [None, "linear_1", "linear_2"])
def test_modules(name, hooked, dtype):
    (ours, theirs, exact), x = twins(name, *ARGUMENTS[name], dtype=torch.float32), draw(name)
    if hooked is not None:
        child = {"linear_1": "mbtf.", "linear_2": "stf."}[hooked] if name == "CompactTokenProjector" else ""
        ours.get_submodule(child + hooked).register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", dtype):
        y, same = ours(x), theirs(x)
        assert y.dtype == nn.Linear(8, 8)(torch.randn(2, 8)).dtype == dtype
    expected = exact([block.double() for block in x] if isinstance(x, list) else x.double())
    assert_within_rule("output", y.detach(), same.detach(), expected.detach())
    y.float().sum().backward()
    same.float().sum().backward()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32, key  # the parameters', as autocast leaves them
        assert (mine.grad - other.grad).norm() <= 0.05 * other.grad.norm(), key


@CASTS
@pytest.mark.parametrize("source", [torch.float32, *HALF, torch.float64], ids=str)
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
    blocks, weight = [torch.randn(2, 16, 8).bfloat16()] * 3, torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert stf_kernels.concat_linear(blocks, weight).dtype == torch.bfloat16
        assert build("CompactTokenProjector")(blocks).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert stf_kernels.concat_linear([block.float() for block in blocks], weight).dtype == torch.float32


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["module", "torch.ops"])
def test_an_operator_computes_in_the_dtype_of_its_operands(source, way):
    """Whatever region its backward is called in; torch.ops has no autocast rule, so its forward too."""
    module, x = build("MultiBlockTokenFusion", dtype=source), draw("MultiBlockTokenFusion", dtype=source)
    parameters = list(module.parameters())
    weights, biases = parameters[::2], parameters[1::2]

    def forward():
        if way == "module":
            return module(x)
        return torch.ops.stf_kernels.token_fusion_mlp(x, weights, biases, "gelu", 0, 1, 0, 0, [True] * 7)[0]

    expected = torch.autograd.grad(forward().sum(), parameters)
    y = forward() if way == "module" else None
    with torch.autocast("cpu", torch.float16 if source == torch.bfloat16 else torch.bfloat16):
        y = forward() if y is None else y
        assert y.dtype == source
        found = torch.autograd.grad(y.sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
