"""If this fails, a layer that is no plain nn.Linear any more is read past: its adapter, hook or forward is skipped.

The expected value is computed layer by layer, through the wrapped modules themselves.
"""

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from support.modules import EACH_MODULE, build, draw, flat
from torch import nn
from torch.nn.utils import parametrizations

import stf_kernels
from reference.functional import spatial_merge

PROJECTOR_LAYERS = ("mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2")
PLACES = pytest.mark.parametrize(
    ("name", "layer"),
    [(name, f"linear_{i}") for name in ("MultiBlockTokenFusion", "SpatialTokenFusion") for i in (1, 2)]
    + [("CompactTokenProjector", layer) for layer in PROJECTOR_LAYERS],
)


def layer_by_layer(module, x):
    """The module's formula, every linear called."""
    if isinstance(module, stf_kernels.CompactTokenProjector):
        return layer_by_layer(module.stf, layer_by_layer(module.mbtf, x))
    joined = torch.cat(x, -1) if isinstance(x, list) else spatial_merge(x, (4, 4), 2, "patch_major", False)
    return module.linear_2(F.gelu(module.linear_1(joined)))


def assert_called(module, x, plain):
    """The value is that of calling every layer, gradients included, and differs from the unwrapped one."""
    y, expected = module(x), layer_by_layer(module, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, plain, rtol=1e-3, atol=1e-4)
    leaves = [leaf for leaf in (*module.parameters(), *flat(x)) if leaf.requires_grad]
    dy = torch.randn_like(y)
    found, exact = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


@pytest.fixture
def case(name):
    module, x = build(name), draw(name, requires_grad=True)
    return module, x, module(x).detach()


class Bare(nn.Module):
    """A layer without weight or bias."""

    def __init__(self, linear):
        super().__init__()
        self.down, self.up = nn.Linear(linear.in_features, 3), nn.Linear(3, linear.out_features)

    def forward(self, x):
        return self.up(self.down(x))


def of_a_subclass(linear):
    linear.__class__ = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 3 * nn.Linear.forward(self, x)})


def with_own_forward(linear):
    original = linear.forward
    linear.forward = lambda x: original(x).sin()


def parametrized(linear):
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(2)


def with_bias_as_buffer(linear):
    """Frozen by hand: still a bias of the layer, though no parameter."""
    bias = linear.bias.detach() + 1
    del linear.bias
    linear.register_buffer("bias", bias)


def with_weight_as_attribute(linear):
    """No parameter, as weight generators and flattened FSDP leave it."""
    weight = 2 * linear.weight.detach()
    del linear.weight
    linear.weight = weight


WRAPPERS = {  # each changes the layer it is given, or returns another one
    "subclass": of_a_subclass,
    "bare": Bare,
    "post-hook": lambda linear: linear.register_forward_hook(lambda _, __, y: 2 * y) and None,
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda _, args: (2 * args[0],)) and None,
    "instance-forward": with_own_forward,
    "parametrized": parametrized,
    "bias-a-buffer": with_bias_as_buffer,
    "weight-an-attribute": with_weight_as_attribute,
}


@PLACES
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_layers(case, layer, wrap):
    module, x, plain = case
    if (replacement := wrap(module.get_submodule(layer))) is not None:
        module.set_submodule(layer, replacement)
    assert_called(module, x, plain)


@PLACES
def test_lora_of_peft(case, layer):
    module, x, plain = case
    model = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=False))
    inner = model.base_model.model
    assert type(inner.get_submodule(layer)) is not nn.Linear
    assert_called(inner, x, plain)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), layer_by_layer(merged, x), rtol=1e-4, atol=1e-5)
    assert type(merged.get_submodule(layer)) is nn.Linear


@PLACES
def test_cpu_offload_of_accelerate(case, layer):
    """Weights that live elsewhere until the layer is called: reading them is an error, calling the layer is not."""
    module, x, plain = case
    accelerate.cpu_offload(module.get_submodule(layer), execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("place", ["mbtf", "stf", "mbtf.linear_2", "stf.linear_1", ""])
def test_every_kind_of_hook_fires_once(kind, place):
    module, x = build("CompactTokenProjector"), draw("CompactTokenProjector", requires_grad=True)
    expected, calls = module(x).detach(), []
    handle = getattr(module.get_submodule(place), f"register_{kind}")(lambda *_: calls.append(1) and None)
    y = module(x)
    y.sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(module(x), expected)  # the fused chain is back


@EACH_MODULE
@pytest.mark.parametrize("reach", ["a global hook", "the class's forward"])
def test_what_reaches_all_layers(case, reach, monkeypatch):
    """How some tools reach every linear layer of a process."""
    module, x, plain = case
    original = nn.Linear.forward
    if reach == "a global hook":
        hooks = nn.modules.module._global_forward_hooks
        monkeypatch.setitem(hooks, 0, lambda layer, _, y: 2 * y if type(layer) is nn.Linear else None)
    else:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
    assert_called(module, x, plain)
    monkeypatch.undo()
    torch.testing.assert_close(module(x), plain)


def test_a_child_of_another_class():
    module, x = build("CompactTokenProjector"), draw("CompactTokenProjector")
    fusion = type(module.mbtf)
    expected = module.stf(2 * module.mbtf(x))
    module.mbtf.__class__ = type("Doubled", (fusion,), {"forward": lambda self, x: 2 * fusion.forward(self, x)})
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("layer", PROJECTOR_LAYERS)
def test_a_bias_in_one_layer_less(layer):
    """The chain's one description does not fit."""
    module, x = build("CompactTokenProjector"), draw("CompactTokenProjector")
    module.get_submodule(layer).bias = None
    torch.testing.assert_close(module(x), layer_by_layer(module, x), rtol=1e-4, atol=1e-5)


def test_children_of_unlike_activations():
    module, x = build("CompactTokenProjector"), draw("CompactTokenProjector")
    module.stf.activation = "silu"
    torch.testing.assert_close(module(x), module.stf(module.mbtf(x)))
