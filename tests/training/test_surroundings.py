"""If these fail, the operators change or lose a gradient because of what happens to be switched on around them."""

import pytest
import torch

import reference
import stf_kernels


def build(package, dtype=torch.float32):
    torch.manual_seed(0)
    return package.CompactTokenProjector(3, 8, 12, skip_tokens=1, dtype=dtype)


def blocks(dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(2, 17, 8, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_inside_anothers_autocast(dtype):
    """The forward ran outside; its gradients are its own dtype's whatever region the backward is called in."""
    module = build(stf_kernels, dtype)
    module(blocks(dtype)).sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    y = module(blocks(dtype))
    with torch.autocast("cpu", torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        y.sum().backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_global_hook_sees_every_layer():
    ours, theirs = build(stf_kernels), build(reference)
    theirs.load_state_dict(ours.state_dict())
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        y = ours(blocks())
    finally:
        handle.remove()
    assert seen.count("Linear") == 4
    torch.testing.assert_close(y, theirs(blocks()), rtol=1e-4, atol=1e-5)


def test_forward_mode_on_the_torch_path():
    module = build(stf_kernels).requires_grad_(False)
    reference_module = build(reference).requires_grad_(False)
    reference_module.load_state_dict(module.state_dict())
    tangents = []
    for candidate in (module, reference_module):
        with torch.autograd.forward_ad.dual_level():
            dual = [torch.autograd.forward_ad.make_dual(block, torch.ones_like(block)) for block in blocks()]
            tangents.append(torch.autograd.forward_ad.unpack_dual(candidate(dual)).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


def test_a_truncated_merge_of_transposed_tokens_compiles():
    """The gradient's strides must be what the compiler was told."""
    weight = torch.randn(6, 32)
    x = torch.randn(25, 3, 8).transpose(0, 1)

    def run(x):
        return stf_kernels.spatial_merge_linear(x, weight, grid=(5, 5), truncate=True)

    gradients = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaf = x.detach().requires_grad_()
        function(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("layer", "replacement", "named"),
    [
        ("stf.linear_2", torch.nn.Linear(100, 12), r"stf\.linear_2\.weight.*128"),
        ("mbtf.linear_1", torch.nn.Linear(20, 32), r"mbtf\.linear_1\.weight.*24"),
        ("mbtf.linear_2", torch.nn.Linear(32, 9), r"stf\.linear_1\.weight.*36"),
    ],
)
def test_a_replaced_layer_that_does_not_fit_is_refused(layer, replacement, named):
    module = build(stf_kernels)
    module.set_submodule(layer, replacement)
    with pytest.raises(ValueError, match=named):
        module(blocks())


def test_a_replaced_bias_that_does_not_fit_is_refused():
    module = build(stf_kernels)
    module.stf.linear_1.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"stf\.linear_1\.bias"):
        module(blocks())
