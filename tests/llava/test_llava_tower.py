"""Broken if this fails: the blocks are not the stock tower's hidden states, or layers run that nobody reads."""

import pytest
import torch
from transformers import AutoModel

from llava_integration.core.tower import tower_hidden_states
from tests.llava import build


def make_tower(config, attn="sdpa"):
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation=attn).eval()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bit_for_bit_the_stock_hidden_states(tower, attn):
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
@pytest.mark.parametrize("run_all", [False, True])
def test_stops_after_the_deepest_block_unless_asked(layers, runs, run_all):
    tower, called = make_tower(build.clip()), []
    for layer in tower.encoder.layers:
        layer.register_forward_hook(lambda module, *_: called.append(module))
    tower.post_layernorm.register_forward_hook(lambda *_: called.append("post_layernorm"))
    pixels = build.pixels(1, torch.float32)
    found = tower_hidden_states(tower, pixels, layers, run_all=run_all)
    assert called == list(tower.encoder.layers[: 6 if run_all else runs])
    assert all(map(torch.equal, found, tower_hidden_states(tower, pixels, layers)))


SHAPES = ((3, 56, 56), (1, 3, 56, 70), (1, 1, 56, 56))
NO_FLOATS = (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), [1.0], None)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [(torch.zeros(shape), ValueError, r"\[images, 3, 56, 56\], got") for shape in SHAPES]
    + [(pixels, TypeError, "a floating-point tensor") for pixels in NO_FLOATS],
)
def test_other_pixels_are_refused(pixels, error, message):
    with pytest.raises(error, match=f"pixel_values: expected {message}"):
        tower_hidden_states(make_tower(build.siglip()), pixels, [1])
