"""If this fails, torch.func's transforms or forward-mode derivatives of an operator are refused or wrong."""

import pytest
import torch
from support.modules import EACH_MODULE, draw, flat, same_state
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import reference
import stf_kernels

MERGE = {"grid": (4, 5), "merge_size": 2, "truncate": True, "skip_tokens": 1}


def functions(package):
    return {
        "concat_linear": lambda x, w, b: package.concat_linear([x, x * 2], w, b, activation="gelu", skip_tokens=1),
        "spatial_merge_linear": lambda x, w, b: package.spatial_merge_linear(x, w, b, activation="silu", **MERGE),
    }


def of_weight_alone(transform):
    return lambda f, x, w, b: transform(lambda w: f(x, w, b))(torch.stack([w, -w]))


def of_bias_alone(transform, loss):
    return lambda f, x, w, b: transform(lambda b: loss(f(x, w, b)))(b)


TRANSFORMS = {
    "grad": lambda f, *t: grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))(*t),
    "vjp": lambda f, *t: vjp(f, *t)[1](torch.ones_like(f(*t))),
    "jvp": lambda f, *t: jvp(f, t, tuple(map(torch.ones_like, t))),
    "vmap": lambda f, *t: vmap(f)(*(torch.stack([x, x + 1]) for x in t)),
    "vmap-of-weights": of_weight_alone(vmap),
    "jacobian": of_bias_alone(jacrev, lambda y: y.sum((0, 1))),
    "hessian": of_bias_alone(hessian, lambda y: y.square().sum()),
}


@pytest.mark.parametrize(
    ("transform", "compiled"),
    [*((name, False) for name in TRANSFORMS), *((name, True) for name in ("grad", "jvp", "vmap"))],
)
@pytest.mark.parametrize(("name", "width"), [("concat_linear", 6), ("spatial_merge_linear", 12)])
def test_functions(name, width, transform, compiled):
    operands = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 21, 3), (5, width), (5,))]
    ours, theirs, transform = functions(stf_kernels)[name], functions(reference)[name], TRANSFORMS[transform]

    def run(*operands):
        return transform(ours, *operands)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tree_leaves(run(*operands)), tree_leaves(transform(theirs, *operands)))


def test_per_sample_gradients_of_the_projector():
    blocks = torch.randn(3, 2, 16, 8, dtype=torch.float64)  # 3 blocks of 2 samples

    def gradients(module):
        def loss(parameters, sample):
            return functional_call(module, parameters, ([block[None] for block in sample],)).square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return vmap(grad(loss), in_dims=(None, 1))(parameters, blocks)

    ours, theirs = same_state("CompactTokenProjector", dtype=torch.float64)
    torch.testing.assert_close(gradients(ours), gradients(theirs))


@EACH_MODULE
def test_forward_mode(name):
    x = draw(name)

    def tangent(module):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(block, torch.ones_like(block)) for block in flat(x)]
            y = module.requires_grad_(False)(dual if isinstance(x, list) else dual[0])
            return forward_ad.unpack_dual(y).tangent

    torch.testing.assert_close(*map(tangent, same_state(name)), rtol=1e-4, atol=1e-5)
