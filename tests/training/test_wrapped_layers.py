"""If this fails, a layer that is no plain nn.Linear any more is read past: its adapter, hook or forward is skipped.

Each wrapper is put on ours and on the reference, which calls nothing behind anyone's back where it matters: the
expected value is computed layer by layer, through the wrapped modules themselves.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import stf_kernels
from reference.functional import spatial_merge

LAYERS = {
    "MultiBlockTokenFusion": ["linear_1", "linear_2"],
    "SpatialTokenFusion": ["linear_1", "linear_2"],
    "CompactTokenProjector": ["mbtf.linear_1", "mbtf.linear_2", "stf.linear_1", "stf.linear_2"],
}
PLACES = pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, layers in LAYERS.items() for layer in layers]
)


def build(name, **options):
    args = {"MultiBlockTokenFusion": (3, 8), "SpatialTokenFusion": (8, 20), "CompactTokenProjector": (3, 8, 20)}[name]
    module = getattr(stf_kernels, name)(*args, **options)
    return module, [torch.randn(2, 16, 8, requires_grad=True) for _ in range(3)]


def run(module, blocks):
    return module(blocks[0]) if isinstance(module, stf_kernels.SpatialTokenFusion) else module(blocks)


def layer_by_layer(module, blocks):
    """The module's formula, every linear called."""
    if isinstance(module, stf_kernels.CompactTokenProjector):
        return layer_by_layer(module.stf, [layer_by_layer(module.mbtf, blocks)])
    if isinstance(module, stf_kernels.MultiBlockTokenFusion):
        x = torch.cat(blocks, -1)
    else:
        x = spatial_merge(blocks[0], (4, 4), 2, "patch_major", False)
    return module.linear_2(F.gelu(module.linear_1(x)))


def assert_called(module, blocks, plain):
    """The value is that of calling every layer, gradients included, and differs from the unwrapped one."""
    y, expected = run(module, blocks), layer_by_layer(module, blocks)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, plain, rtol=1e-3, atol=1e-4)
    leaves = [p for p in (*module.parameters(), *blocks) if p.requires_grad]
    if isinstance(module, stf_kernels.SpatialTokenFusion):
        leaves = [leaf for leaf in leaves if not any(leaf is block for block in blocks[1:])]
    dy = torch.randn_like(y)
    found, exact = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def replace(module, layer, new):
    parent, _, name = layer.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


class Scaled(nn.Linear):
    """A linear of another class."""

    def forward(self, x):
        return 3 * super().forward(x)


class Bare(nn.Module):
    """A layer without weight or bias."""

    def __init__(self, linear):
        super().__init__()
        self.down, self.up = nn.Linear(linear.in_features, 3), nn.Linear(3, linear.out_features)

    def forward(self, x):
        return self.up(self.down(x))


@PLACES
@pytest.mark.parametrize("kind", ["subclass", "bare", "post-hook", "pre-hook", "instance-forward", "parametrized"])
def test_layers(name, layer, kind):
    module, blocks = build(name)
    plain, linear = run(module, blocks).detach(), module.get_submodule(layer)
    if kind == "subclass":
        scaled = Scaled(linear.in_features, linear.out_features)
        scaled.load_state_dict(linear.state_dict())
        replace(module, layer, scaled)
    elif kind == "bare":
        replace(module, layer, Bare(linear))
    elif kind == "post-hook":
        linear.register_forward_hook(lambda _, __, y: 2 * y)
    elif kind == "pre-hook":
        linear.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    elif kind == "instance-forward":
        original = linear.forward
        linear.forward = lambda x: original(x).sin()
    else:
        parametrizations.weight_norm(linear)
        with torch.no_grad():
            linear.parametrizations.weight.original0.mul_(2)
    assert_called(module, blocks, plain)


@PLACES
def test_lora_of_peft(name, layer):
    import peft

    module, blocks = build(name)
    plain = run(module, blocks).detach()
    config = peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=False)
    model = peft.get_peft_model(module, config)
    inner = model.base_model.model
    assert type(inner.get_submodule(layer)) is not nn.Linear
    assert_called(inner, blocks, plain)
    trained = {name for name, p in inner.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    run(inner, blocks).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in inner.parameters())
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, blocks), layer_by_layer(merged, blocks), rtol=1e-4, atol=1e-5)
    assert type(merged.get_submodule(layer)) is nn.Linear


@PLACES
def test_hook_of_accelerate(name, layer):
    import accelerate.hooks

    calls = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append("pre")
            return args, kwargs

        def post_forward(self, module, output):
            calls.append("post")
            return 2 * output

    module, blocks = build(name)
    plain = run(module, blocks).detach()
    accelerate.hooks.add_hook_to_module(module.get_submodule(layer), Hook())
    assert_called(module, blocks, plain)
    assert calls[:2] == ["pre", "post"]
    accelerate.hooks.remove_hook_from_module(module.get_submodule(layer))
    torch.testing.assert_close(run(module, blocks), plain)


@PLACES
def test_cpu_offload_of_accelerate(name, layer):
    """Weights that live elsewhere until the layer is called: reading them is an error, calling the layer is not."""
    import accelerate

    module, blocks = build(name)
    blocks = [block.detach() for block in blocks]
    plain = run(module, blocks).detach()
    accelerate.cpu_offload(module.get_submodule(layer), execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(run(module, blocks), plain)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("place", ["mbtf", "stf", "mbtf.linear_2", "stf.linear_1", ""])
def test_every_kind_of_hook_fires_once(kind, place):
    module, blocks = build("CompactTokenProjector")
    expected = run(module, blocks).detach()
    calls = []
    getattr(module.get_submodule(place), f"register_{kind}")(lambda *_: calls.append(1) and None)
    y = run(module, blocks)
    y.sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_removed_hook_gives_the_fused_chain_back():
    module, blocks = build("CompactTokenProjector")
    fused = run(module, blocks)
    handle = module.mbtf.linear_1.register_forward_hook(lambda _, __, y: 2 * y)
    assert not torch.equal(run(module, blocks), fused)
    handle.remove()
    assert torch.equal(run(module, blocks), fused)


@PLACES
def test_a_bias_that_is_a_buffer(name, layer):
    """Frozen by hand: still a bias of the layer, though no parameter."""
    module, blocks = build(name)
    linear = module.get_submodule(layer)
    bias = linear.bias.detach() + 1
    plain = run(module, blocks).detach()
    del linear.bias
    linear.register_buffer("bias", bias)
    assert_called(module, blocks, plain)


@PLACES
def test_a_weight_tied_to_something_plain(name, layer):
    """A weight that is an attribute and no parameter, as weight generators and flattened FSDP leave it."""
    module, blocks = build(name)
    plain = run(module, blocks).detach()
    linear = module.get_submodule(layer)
    weight = 2 * linear.weight.detach()
    del linear.weight
    linear.weight = weight
    assert_called(module, blocks, plain)


@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_put_into_the_class(name, monkeypatch):
    """How some tools reach every linear layer of a process."""
    module, blocks = build(name)
    plain, original = run(module, blocks).detach(), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x))
    assert_called(module, blocks, plain)


def test_a_child_of_another_class():
    class Doubled(stf_kernels.MultiBlockTokenFusion):
        def forward(self, blocks):
            return 2 * super().forward(blocks)

    module, blocks = build("CompactTokenProjector")
    doubled = Doubled(3, 8)
    doubled.load_state_dict(module.mbtf.state_dict())
    expected = module.stf(2 * module.mbtf(blocks))
    module.mbtf = doubled
    torch.testing.assert_close(module(blocks), expected)


def test_children_that_disagree():
    """Other activations, or a bias in one child only: the chain's one description does not fit both."""
    module, blocks = build("CompactTokenProjector")
    module.stf.activation = "silu"
    expected = module.stf(module.mbtf(blocks))
    torch.testing.assert_close(module(blocks), expected)
    module, blocks = build("CompactTokenProjector")
    module.mbtf.linear_1.bias = None
    torch.testing.assert_close(run(module, blocks), layer_by_layer(module, blocks), rtol=1e-4, atol=1e-5)
    module, blocks = build("CompactTokenProjector")
    module.stf.linear_2.bias = None
    torch.testing.assert_close(run(module, blocks), layer_by_layer(module, blocks), rtol=1e-4, atol=1e-5)
