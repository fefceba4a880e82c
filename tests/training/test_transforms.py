"""If this fails, torch.func's transforms or forward-mode derivatives of an operator are refused or wrong, perhaps on a
GPU alone: a CPU copies as one here."""

from functools import partial

import pytest
import torch
from support.compare import twins
from support.modules import ARGUMENTS, EACH_MODULE, draw, flat
from support.operators import CASES
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import reference
import stf_kernels
from stf_kernels.ops import torch_path

TRANSFORMS = {  # of a function f of t = (weight, bias, *blocks)
    "grad": lambda f, *t: grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(len(t))))(*t),
    "vjp": lambda f, *t: vjp(f, *t)[1](torch.ones_like(f(*t))),
    "jvp": lambda f, *t: jvp(f, t, tuple(map(torch.ones_like, t))),
    "vmap": lambda f, *t: vmap(f)(*(torch.stack([x, x + 1]) for x in t)),
    "vmap-of-weights": lambda f, w, *t: vmap(lambda w: f(w, *t))(torch.stack([w, -w])),
    "jacobian": lambda f, w, b, *x: jacrev(lambda b: f(w, b, *x).sum((0, 1)))(b),
    "hessian": lambda f, w, b, *x: hessian(lambda b: f(w, b, *x).square().sum())(b),
}
COMPILED = ("grad", "jvp", "vmap")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch_path, "copies_by_element", lambda x: True)


@pytest.mark.parametrize(
    ("transform", "compiled"), [*((name, False) for name in TRANSFORMS), *((name, True) for name in COMPILED)]
)
@pytest.mark.parametrize("case", ["act-gelu", "merge-last-of-both"])
def test_functions(case, transform, compiled):
    (call, shapes), transform = CASES[case], TRANSFORMS[transform]
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]

    def run(*operands):
        return transform(partial(call, stf_kernels), *operands)

    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected = transform(partial(call, reference), *operands)
    torch.testing.assert_close(tree_leaves(run(*operands)), tree_leaves(expected))


def test_per_sample_gradients_of_the_projector():
    blocks = torch.randn(3, 2, 16, 8, dtype=torch.float64)  # 3 blocks of 2 samples

    def gradients(module):
        def loss(parameters, sample):
            return functional_call(module, parameters, ([block[None] for block in sample],)).square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return vmap(grad(loss), in_dims=(None, 1))(parameters, blocks)

    ours, theirs = twins("CompactTokenProjector", 3, 8, 20, dtype=torch.float64)[:2]
    torch.testing.assert_close(gradients(ours), gradients(theirs))


@EACH_MODULE
def test_forward_mode(name):
    x = draw(name)

    def tangent(module):
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(block, torch.ones_like(block)) for block in flat(x)]
            y = module.requires_grad_(False)(dual if isinstance(x, list) else dual[0])
            return forward_ad.unpack_dual(y).tangent

    torch.testing.assert_close(
        *map(tangent, twins(name, *ARGUMENTS[name], dtype=torch.float32)[:2]), rtol=1e-4, atol=1e-5
    )
