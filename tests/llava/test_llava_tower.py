"""Broken if this fails: the blocks are not the stock tower's hidden states, or layers run that nobody reads."""

import pytest
import torch
from transformers import AutoModel

from llava_integration.core.tower import tower_hidden_states


def make_tower(config, attn="sdpa"):
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=attn).eval()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bit_for_bit_the_stock_hidden_states(build, tower, attn):
    tower = make_tower(getattr(build, tower)(), attn)
    pixels = build.pixels(2, torch.float32)
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True).hidden_states
        layers = [len(stock) - 1, 0, 3, 1]
        ours = tower_hidden_states(tower, pixels, layers)
    assert len(ours) == 4
    for layer, hidden in zip(layers, ours, strict=True):
        assert torch.equal(hidden, stock[layer]), layer


@pytest.mark.parametrize(("layers", "runs"), [([4, 2], 4), ([1, 3], 3), ([0], 0), ([6], 6)])
def test_stops_after_the_deepest_block(build, layers, runs):
    tower, called = make_tower(build.clip()), []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda module, *_: called.append(module))
    tower.post_layernorm.register_forward_hook(lambda *_: called.append("post_layernorm"))
    tower_hidden_states(tower, build.pixels(1, torch.float32), layers)
    assert called == list(tower.encoder.layers[:runs])


def test_the_whole_tower_runs_when_asked(build):
    tower, called = make_tower(build.clip()), []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda module, *_: called.append(module))
    pixels = build.pixels(1, torch.float32)
    all_layers = tower_hidden_states(tower, pixels, [2], run_all=True)
    assert called == list(tower.encoder.layers)
    assert torch.equal(all_layers[0], tower_hidden_states(tower, pixels, [2])[0])


def test_gradient_checkpointing_gives_the_same_gradients(build):
    tower, pixels = make_tower(build.clip()).train(), build.pixels(1, torch.float32)

    def gradient():
        tower.zero_grad()
        sum(block.square().sum() for block in tower_hidden_states(tower, pixels, [5, 2])).backward()
        return tower.encoder.layers[0].mlp.fc1.weight.grad.clone()

    expected, calls = gradient(), []
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    tower.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(gradient(), expected)
    assert len(calls) == 2, "the layer was not recomputed: checkpointing is off"


def test_compiles_without_a_graph_break(build):
    tower, pixels = make_tower(build.clip(num_hidden_layers=2)), build.pixels(1, torch.float32)
    compiled = torch.compile(tower_hidden_states, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, expected in zip(
            compiled(tower, pixels, [2, 0]), tower_hidden_states(tower, pixels, [2, 0]), strict=True
        ):
            assert torch.allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 3, 56, 70), (1, 1, 56, 56)])
def test_pixels_of_another_shape_are_refused(build, shape):
    tower = make_tower(build.siglip())
    with pytest.raises(ValueError, match=r"pixel_values: expected \[images, 3, 56, 56\], got"):
        tower_hidden_states(tower, torch.zeros(shape), [1])


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 56, 56, dtype=torch.uint8), [1.0], None])
def test_pixels_that_are_no_float_tensor_are_refused(build, pixels):
    with pytest.raises(TypeError, match="pixel_values: expected a floating-point tensor"):
        tower_hidden_states(make_tower(build.clip()), pixels, [1])
