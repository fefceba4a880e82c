"""If this fails, torch.func's transforms or forward-mode derivatives of an operator are refused or wrong."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import reference
import stf_kernels

MERGE = {"grid": (4, 5), "merge_size": 2, "truncate": True, "skip_tokens": 1}


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def functions(package):
    return {
        "concat_linear": lambda x, w, b: package.concat_linear([x, x * 2], w, b, activation="gelu", skip_tokens=1),
        "spatial_merge_linear": lambda x, w, b: package.spatial_merge_linear(x, w, b, activation="silu", **MERGE),
    }


@pytest.fixture(params=["concat_linear", "spatial_merge_linear"])
def pair(request):
    width = {"concat_linear": 6, "spatial_merge_linear": 12}[request.param]
    operands = draw(2, 21, 3), draw(5, width), draw(5)
    return functions(stf_kernels)[request.param], functions(reference)[request.param], operands


def same(transform, pair):
    ours, theirs, operands = pair
    found, expected = tree_leaves(transform(ours, operands)), tree_leaves(transform(theirs, operands))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_grad(pair):
    same(lambda f, operands: grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(*operands), pair)


def test_vjp(pair):
    same(lambda f, operands: vjp(f, *operands)[1](torch.ones_like(f(*operands))), pair)


def test_jvp(pair):
    same(lambda f, operands: jvp(f, operands, tuple(torch.ones_like(t) for t in operands)), pair)


def test_vmap_over_everything(pair):
    same(lambda f, operands: vmap(f)(*(torch.stack([t, t + 1]) for t in operands)), pair)


def test_vmap_over_weights_alone(pair):
    x, w, b = pair[2]
    same(lambda f, _: vmap(lambda w: f(x, w, b))(torch.stack([w, -w])), pair)


def test_jacobian_and_hessian(pair):
    x, w, b = pair[2]
    same(lambda f, _: jacrev(lambda b: f(x, w, b).sum((0, 1)))(b), pair)
    same(lambda f, _: hessian(lambda b: f(x, w, b).square().sum())(b), pair)


def test_per_sample_gradients_of_the_projector():
    arguments = (3, 4, 10)
    ours = stf_kernels.CompactTokenProjector(*arguments, skip_tokens=1, dtype=torch.float64)
    theirs = reference.CompactTokenProjector(*arguments, skip_tokens=1, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    blocks = draw(3, 2, 17, 4)  # 3 blocks of 2 samples

    def gradients(module):
        def loss(parameters, sample):
            return functional_call(module, parameters, ([block[None] for block in sample],)).square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return vmap(grad(loss), in_dims=(None, 1))(parameters, blocks)

    found, expected = gradients(ours), gradients(theirs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


COMPILED = {
    "grad": lambda f, operands: grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(*operands),
    "jvp": lambda f, operands: jvp(f, operands, tuple(torch.ones_like(t) for t in operands)),
    "vmap": lambda f, operands: vmap(f)(*(torch.stack([t, t + 1]) for t in operands)),
}


@pytest.mark.parametrize("transform", COMPILED.values(), ids=COMPILED)
def test_a_transform_inside_torch_compile(transform, pair):
    torch._dynamo.reset()
    compiled = torch.compile(lambda operands: transform(pair[0], operands), backend="aot_eager", fullgraph=True)
    same(lambda f, operands: compiled(operands) if f is pair[0] else transform(f, operands), pair)
