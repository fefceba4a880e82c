"""Broken if this fails: the blocks are not the stock tower's hidden states, or layers run that nobody reads."""

import pytest
import torch
from transformers import AutoModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionModel

from llava_integration.core.tower import check_pixels, tower_hidden_states
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


@pytest.fixture
def ran(monkeypatch):
    """The tower's layers and towers that run, seen by their classes: a hook would be noticed."""
    calls = []
    for cls in (CLIPEncoderLayer, CLIPVisionModel):
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, *a, f=forward, **k: calls.append(self) or f(self, *a, **k))
    return calls


@pytest.mark.parametrize(("layers", "runs"), [([4, 2], 4), ([1, 3], 3), ([0], 0), ([6], 6)])
@pytest.mark.parametrize("run_all", [False, True])
def test_stops_after_the_deepest_block_unless_asked(ran, layers, runs, run_all):
    tower = make_tower(build.clip())
    pixels = build.pixels(1, torch.float32)
    found = tower_hidden_states(tower, pixels, layers, run_all=run_all)
    assert ran == list(tower.encoder.layers[: 6 if run_all else runs])
    assert all(map(torch.equal, found, tower_hidden_states(tower, pixels, layers)))


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def _hooked(part):
    def change(tower):
        module = part(tower)
        module.register_forward_hook(lambda *_: None)
        return tower

    return change


def _accelerate(tower):
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(tower, hooks.ModelHook())


def _adapted(tower):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tower, peft.LoraConfig(target_modules=["q_proj"])).eval()


def _compiled(tower):
    tower.compile(backend="eager")
    return tower


WATCHED = {
    "hook": _hooked(lambda tower: tower),
    "hook on the encoder": _hooked(lambda tower: tower.encoder),
    "hook on a layer nobody reads": _hooked(lambda tower: tower.encoder.layers[5].mlp),
    "hook on the head": _hooked(lambda tower: tower.post_layernorm),
    "accelerate": _accelerate,
    "compiled in place": _compiled,
    "compiled": lambda tower: torch.compile(tower, backend="eager"),
    "wrapped": Wrapper,
    "adapted": _adapted,
}


@pytest.mark.parametrize("how", WATCHED)
def test_a_tower_that_somebody_watches_is_called_as_the_module_it_is(ran, how):
    """A hook fires, a wrapper is asked, whatever it does with the pixels."""
    tower, pixels = make_tower(build.clip()), build.pixels(1, torch.float32)
    expected = tower_hidden_states(tower, pixels, [4, 2])
    ran.clear()
    with torch.no_grad():
        found = tower_hidden_states(WATCHED[how](tower), pixels, [4, 2])
    assert tower in ran
    assert all(map(torch.equal, found, expected))


def test_hooks_on_what_runs_anyway_and_transformers_own_change_nothing(ran):
    tower, pixels = make_tower(build.clip()), build.pixels(1, torch.float32)
    tower(pixels, output_hidden_states=True)
    tower.encoder.layers[0].register_forward_hook(lambda *_: None)
    ran.clear()
    tower_hidden_states(tower, pixels, [4, 2])
    assert ran == list(tower.encoder.layers[:4])


SHAPES = ((3, 56, 56), (1, 3, 56, 70), (1, 1, 56, 56))
NO_FLOATS = (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), [1.0], None)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [(torch.zeros(shape), ValueError, r"\[images, 3, 56, 56\], got") for shape in SHAPES]
    + [(pixels, TypeError, "a floating-point tensor") for pixels in NO_FLOATS],
)
def test_other_pixels_are_refused(pixels, error, message):
    with pytest.raises(error, match=f"pixel_values: expected {message}"):
        check_pixels(build.siglip(), pixels)
