"""Broken if this fails: from_llava changes what an LLaVA-1.5 checkpoint computes, or leaves it unable to train."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

import llava_integration as li
from llava_integration.core.config import default_blocks
from tests.llava import build


def pooled(tokens, side, merge_size):
    """[N, side*side, D] -> the merge_size x merge_size average, row-major; truncating."""
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    return F.avg_pool2d(grid, merge_size).flatten(2).transpose(1, 2)


def features(model, pixels):
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))


def check_equals_pooled_stock(stock, stf, pixels, merge_size=2):
    expected = features(stock, pixels)
    expected = pooled(expected, int(expected.shape[1] ** 0.5), merge_size)
    ours = features(stf, pixels)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("merge_size", [1, 2, 4])
def test_image_tokens_are_the_average_of_the_stock_tokens(merge_size, activation):
    stock = build.stock(projector_hidden_act=activation)
    stf = li.from_llava(stock, merge_size=merge_size)
    assert stf.config.image_seq_length == (4 // merge_size) ** 2
    check_equals_pooled_stock(stock, stf, build.pixels(3), merge_size)


@pytest.mark.parametrize(
    ("stock", "options", "expected"),
    [
        ({"multimodal_projector_bias": False}, {}, {}),
        ({"text": {"hidden_size": 80}}, {}, {"stf_hidden_size": 4 * 80}),  # as 13B: r*r of the stock projector's width
        ({"vision_feature_layer": 4}, {}, {"vision_feature_layer": [4, 3, 2, 1]}),
        ({}, {"blocks": [5]}, {"vision_feature_layer": [5]}),
        ({}, {"blocks": [1, 5, 3]}, {"vision_feature_layer": [1, 5, 3]}),
        ({}, {"blocks": [-1, -2]}, {"vision_feature_layer": [6, 5]}),
        ({}, {"mbtf_hidden_size": 64}, {"mbtf_hidden_size": 64}),  # the narrowest that is exact
        ({"vision": {"image_size": 70}}, {"truncate": True}, {"image_seq_length": 4}),
    ],
    ids=str,
)
def test_other_sizes(stock, options, expected):
    parts = {"text": build.llama(**stock.get("text", {})), "vision": build.clip(**stock.get("vision", {}))}
    stock = build.stock(**stock | parts)
    stf = li.from_llava(stock, **options)
    assert {name: getattr(stf.config, name) for name in expected} == expected
    check_equals_pooled_stock(stock, stf, build.pixels(2, size=stock.config.vision_config.image_size))


@pytest.mark.parametrize(
    ("options", "r"),
    [({}, 3), ({"merge_size": 2, "truncate": True}, 2), ({"truncate": True}, 2), ({"merge_size": 9}, 9)],
)
def test_a_siglip_tower_and_the_default_window(options, r):
    """A grid of 9x9 that no 2x2 divides, as SigLIP's 27x27; no CLS token; the last layer is read."""
    vision = build.siglip(image_size=130, vision_use_head=False)
    stock = build.stock(vision=vision, vision_feature_select_strategy="full", vision_feature_layer=-1)
    stf = li.from_llava(stock, **options)
    assert (stf.config.spatial_merge_size, stf.config.image_seq_length) == (r, (9 // r) ** 2)
    check_equals_pooled_stock(stock, stf, build.pixels(2, size=130), r)


def test_it_generates_with_the_stock_models_settings(stock):
    stock.generation_config.update(eos_token_id=[3, 7], max_new_tokens=5)
    stf = li.from_llava(stock)
    assert stf.generation_config.to_dict() == stock.generation_config.to_dict()
    stf.generation_config.max_new_tokens = 9
    assert stock.generation_config.max_new_tokens == 5


@pytest.mark.parametrize("shared", [True, False])
def test_sharing_and_the_stock_model_untouched(stock, shared):
    before, config = copy.deepcopy(stock.state_dict()), stock.config.to_dict()
    stf = li.from_llava(stock, copy=not shared)
    for name in ("vision_tower", "language_model"):
        assert (getattr(stf.model, name) is getattr(stock.model, name)) == shared
    assert (stf.lm_head is stock.lm_head) == shared
    with torch.no_grad():
        for parameter in stf.model.multi_modal_projector.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())
    assert stock.config.to_dict() == config
    assert not any(p.is_meta for p in stf.parameters())


def test_tied_embeddings_stay_tied_in_a_copy():
    stock = build.stock(text=build.llama(tie_word_embeddings=True), tie_word_embeddings=True)
    stf = li.from_llava(stock, copy=True)
    assert stf.lm_head.weight is stf.get_input_embeddings().weight
    assert stf.lm_head.weight is not stock.lm_head.weight


@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_and_attention_follow_the_stock_model(training):
    stock = build.stock(torch.bfloat16).train(training)
    stock.set_attn_implementation("eager")
    stf = li.from_llava(stock)
    assert {p.dtype for p in stf.parameters()} == {torch.bfloat16}
    assert {module.training for module in stf.modules()} == {training}
    assert stf.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("selected", "expected"),
    [
        (23, [23, 21, 18, 15, 12, 9, 6, 3]),
        (26, [26, 24, 21, 18, 15, 12, 9, 6]),
        (11, [11, 10, 8, 7, 6, 4, 3, 1]),
        (5, [5, 4, 3, 2, 1]),
        (0, [0]),
    ],
)
def test_default_blocks(selected, expected):
    assert default_blocks(selected) == expected


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"vision_feature_layer": [-2, -3]}, {}, ValueError, "model: expected one vision_feature_layer, got the list"),
        ({"vision_feature_select_strategy": "full"}, {}, ValueError, "model: expected .*select_strategy='default'"),
        ({"vision": build.siglip()}, {}, ValueError, "model: expected .*select_strategy='full' with a siglip"),
        ({}, {"blocks": [6, 3]}, ValueError, "blocks: expected layer 5 among them"),
        ({}, {"blocks": [5, 9]}, ValueError, "blocks: expected layers from -7 to 6"),
        ({}, {"blocks": []}, ValueError, "blocks: expected at least one layer"),
        ({}, {"blocks": ["5"]}, TypeError, "blocks: expected an int or a list of ints"),
        ({}, {"merge_size": 3}, ValueError, "merge_size: expected a divisor of the 4x4 grid or truncate=True, got 3"),
        ({}, {"merge_size": 0}, ValueError, "merge_size: expected a divisor"),
        ({}, {"merge_size": 5, "truncate": True}, ValueError, "^merge_size: expected .* got 5"),
        ({}, {"merge_size": 2.0}, TypeError, "merge_size: expected .* got 2.0"),
        ({}, {"mbtf_hidden_size": 63}, ValueError, r"mbtf_hidden_size: expected at least 2 \* 32 = 64, got 63"),
        ({}, {"mbtf_hidden_size": "64"}, TypeError, "mbtf_hidden_size: expected .* got '64'"),
        ({}, {"copy": "no"}, TypeError, "copy: expected .* got 'no'"),
        ({}, {"truncate": 1}, TypeError, "truncate: expected .* got 1"),
    ],
)
def test_refusals(changes, options, error, message):
    with pytest.raises(error, match=message):
        li.from_llava(build.stock(**changes), **options)


def test_wrong_models_are_refused(stock, stf):
    for wrong in (stf, stock.model, None):
        with pytest.raises(TypeError, match="model: expected a stock transformers LlavaForConditionalGeneration, "):
            li.from_llava(wrong)
    stock.config.vision_config.image_size = [56, 112]
    with pytest.raises(ValueError, match="vision_config: expected a square grid"):
        li.from_llava(stock)
    stock.model.multi_modal_projector.norm = torch.nn.LayerNorm(32)
    with pytest.raises(TypeError, match=r"model: expected a multi_modal_projector of two linears .* got \['norm'\]"):
        li.from_llava(stock)
    del stock.model.multi_modal_projector.norm
    stock.model.multi_modal_projector.linear_2 = torch.nn.Sequential(stock.model.multi_modal_projector.linear_2)
    with pytest.raises(TypeError, match=r"model: expected multi_modal_projector.linear_2 to be a plain nn.Linear"):
        li.from_llava(stock)


def test_weights_that_are_not_there_are_refused(stock):
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(stock.config)
    with pytest.raises(ValueError, match=r"model: .* meta device"):
        li.from_llava(empty)
