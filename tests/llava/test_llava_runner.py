"""Broken if this fails: the static prefill that the benchmark times computes something else than the model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils

import llava_integration as li
from tests.llava import build


def eager(model, ids, pixels):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, use_cache=True)


def prompt(model, images=(1, 1)):
    config = model.config
    is_stf = isinstance(model, li.LlavaStfForConditionalGeneration)
    ids, _ = build.prompt(images, config.image_seq_length if is_stf else 16)
    return ids, build.pixels(sum(images))


@pytest.fixture(params=["stf", "stock"])
def model(request):
    return request.getfixturevalue(request.param)


def test_logits_equal_the_eager_forward(model):
    ids, pixels = prompt(model)
    runner = li.PrefillRunner(model, *ids.shape)
    for images in (pixels, pixels.flip(0)):
        logits = runner(ids, images)
        assert logits.shape == (2, 64)
        assert torch.allclose(logits, eager(model, ids, images).logits[:, -1], rtol=0, atol=1e-12)


def test_decoding_continues_from_the_cache(model):
    ids, pixels = prompt(model)
    runner = li.PrefillRunner(model, *ids.shape, max_new_tokens=4)
    for _ in range(2):  # the second prefill must start over in the same cache
        logits = runner(ids, pixels)
        assert int(runner.cache.get_seq_length()) == ids.shape[1]
        out = eager(model, ids, pixels)
        for _ in range(4):
            token = logits.argmax(-1, keepdim=True)
            with torch.no_grad():
                logits = model(input_ids=token, past_key_values=runner.cache, use_cache=True).logits[:, -1]
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            assert torch.allclose(logits, out.logits[:, -1], rtol=0, atol=1e-10)


def test_several_images_none_and_another_count(stf):
    ids, pixels = prompt(stf, (2, 2))
    runner = li.PrefillRunner(stf, *ids.shape)
    assert torch.allclose(runner(ids, pixels), eager(stf, ids, pixels).logits[:, -1], atol=1e-12)
    text = torch.full_like(ids, 7)
    assert torch.allclose(runner(text), eager(stf, text, None).logits[:, -1], atol=1e-12)
    one = text.clone()
    one[1, 3:7] = build.IMAGE_TOKEN
    assert torch.allclose(runner(one, pixels[:1]), eager(stf, one, pixels[:1]).logits[:, -1], atol=1e-12)


def test_eager_attention(stf):
    """Its mask is a tensor and must be as wide as the keys that attention gets."""
    stf.set_attn_implementation("eager")
    ids, pixels = prompt(stf)
    logits = li.PrefillRunner(stf, *ids.shape)(ids, pixels)
    assert torch.allclose(logits, eager(stf, ids, pixels).logits[:, -1], atol=1e-6)


def test_a_stock_prompt_of_the_wrong_length(stock):
    ids, _ = build.prompt([1, 1], 4)
    with pytest.raises(ValueError, match="input_ids: found 8 image tokens, but 32 are needed"):
        li.PrefillRunner(stock, *ids.shape)(ids, build.pixels(2))


def test_attention_reads_the_prompt_only(stf):
    """Not the whole static buffer: that would cost time and need a mask."""
    ids, pixels = prompt(stf)
    seen = []
    attention = stf.model.language_model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    li.PrefillRunner(stf, *ids.shape, max_new_tokens=50)(ids, pixels)
    assert seen == [None]


def test_no_mask_is_made_under_capture_either(model, monkeypatch):
    """transformers 5.17 makes one for every captured stream, and with a mask sdpa has no flash kernel."""
    ids, pixels = prompt(model)
    expected = eager(model, ids, pixels).logits[:, -1]
    masks, seen = [], []
    layer = model.model.language_model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *call: seen.append(call[2]["attention_mask"]), with_kwargs=True)
    made = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **k: masks.append(1) or made(*a, **k)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    logits = li.PrefillRunner(model, *ids.shape)(ids, pixels)
    assert seen == [None]
    assert masks == []
    assert torch.allclose(logits, expected, rtol=0, atol=1e-12)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_tower_layers_that_run(stock):
    ids, pixels = prompt(stock)
    ran = []
    for layer in stock.model.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    logits = [li.PrefillRunner(stock, *ids.shape, full_tower=full)(ids, pixels) for full in (False, True)]
    assert len(ran) == 5 + 6
    assert torch.equal(*logits)


def test_a_list_of_layers_in_the_stock_model():
    stock = build.stock(vision_feature_layer=[-2, 2])
    ids, pixels = prompt(stock)
    logits = li.PrefillRunner(stock, *ids.shape)(ids, pixels)
    assert torch.allclose(logits, eager(stock, ids, pixels).logits[:, -1], atol=1e-12)


def test_returned_logits_are_the_callers(stf):
    ids, pixels = prompt(stf)
    runner = li.PrefillRunner(stf, *ids.shape)
    first = runner(ids, pixels)
    kept = first.clone()
    runner(ids, pixels.flip(0))
    assert torch.equal(first, kept)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda i, p: (i[:, 1:], p), ValueError, r"input_ids: expected shape \[2, 10\], got \[2, 9\]"),
            (lambda i, p: (i[:1], p), ValueError, r"input_ids: expected shape \[2, 10\], got \[1, 10\]"),
            (lambda i, p: (i.int(), p), TypeError, "input_ids: expected an int64 tensor .* got torch.int32"),
            (lambda i, p: (None, p), TypeError, "input_ids: expected an int64 tensor .* got NoneType"),
            (lambda i, p: (i, p[0]), ValueError, r"pixel_values: expected \[images, 3, 56, 56\]"),
            (lambda i, p: (i, list(p)), TypeError, "pixel_values: expected a floating-point tensor .* got list"),
            (lambda i, p: (i, p[:1]), ValueError, "input_ids: found 8 image tokens .* 4 are needed"),
            (lambda i, p: (i, None), ValueError, "input_ids: found 8 image tokens .* 0 are needed"),
        ],
    )
    def test_calls(self, stf, change, error, message):
        ids, pixels = prompt(stf)
        runner = li.PrefillRunner(stf, *ids.shape)
        with pytest.raises(error, match=message):
            runner(*change(ids, pixels))

    def test_construction(self, stf):
        with pytest.raises(TypeError, match="model: expected a LLaVA or LLaVA-STF ForConditionalGeneration, got"):
            li.PrefillRunner(stf.model, 1, 8)
        with pytest.raises(ValueError, match="batch: expected an int of at least 1, got 0"):
            li.PrefillRunner(stf, 0, 8)
        with pytest.raises(ValueError, match=r"seq_len: expected an int of at least 1, got 8.0"):
            li.PrefillRunner(stf, 1, 8.0)
        with pytest.raises(ValueError, match="model: expected eval mode"):
            li.PrefillRunner(stf.train(), 1, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGraph:
    """One CUDA graph, no synchronisation in it, the same logits as eager."""

    @pytest.mark.parametrize("kind", ["stf", "stock"])
    def test_captured_equals_eager_and_does_not_wait(self, kind):
        model = getattr(build, kind)(torch.float32).cuda()
        ids, pixels = (t.cuda() for t in prompt(model))
        pixels = pixels.float()
        runner = li.PrefillRunner(model, *ids.shape)
        runner(ids, pixels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            logits = runner(ids, pixels.flip(0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        out = eager(model, ids, pixels.flip(0))
        assert torch.allclose(logits, out.logits[:, -1], rtol=1e-3, atol=1e-3)
        token = logits.argmax(-1, keepdim=True)
        with torch.no_grad():
            ours = model(input_ids=token, past_key_values=runner.cache, use_cache=True).logits
            theirs = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True).logits
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("kind", ["stf", "stock"])
    def test_the_flash_kernels_serve_it(self, kind):
        """With no other kernel to choose from, a mask would be an error."""
        model = getattr(build, kind)(torch.float32, **build.wide()).to("cuda", torch.bfloat16)
        ids, pixels = (t.cuda() for t in prompt(model))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            logits = li.PrefillRunner(model, *ids.shape)(ids, pixels.bfloat16())
        assert logits.isfinite().all()
