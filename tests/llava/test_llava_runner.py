"""Broken if this fails: the static prefill that the benchmark times computes something else than the model."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import llava_integration as li
from tests.llava import build


def eager(model, ids, pixels=None):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, use_cache=True)


def prompt(model, images=(1, 1)):
    ids, _ = build.prompt(images, model.config.image_seq_length)
    return ids, build.pixels(sum(images))


def check(model):
    """Two calls of one runner, whose results are the caller's to keep."""
    ids, pixels = prompt(model)
    runner = li.PrefillRunner(model, *ids.shape)
    for images, logits in [(images, runner(ids, images)) for images in (pixels, pixels.flip(0))]:
        assert logits.shape == (2, 64)
        atol = 1e-6 if model.config._attn_implementation == "eager" else 1e-12  # eager takes softmax in fp32
        assert torch.allclose(logits, eager(model, ids, images).logits[:, -1], rtol=0, atol=atol)


@pytest.fixture(params=["stf", "stock"])
def model(request):
    return request.getfixturevalue(request.param)


def test_logits_equal_the_eager_forward(model):
    check(model)


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


def test_several_images_none_and_another_count(stf, monkeypatch):
    """Of which the newest alone are kept."""
    monkeypatch.setattr("llava_integration.runner.MOST_GRAPHS", 1)
    ids, pixels = prompt(stf, (2, 2))
    runner = li.PrefillRunner(stf, *ids.shape)
    text = torch.full_like(ids, 7)
    one = text.clone()
    one[1, 3:7] = build.IMAGE_TOKEN
    for call in ((ids, pixels), (text,), (one, pixels[:1])):
        assert torch.allclose(runner(*call), eager(stf, *call).logits[:, -1], atol=1e-12)
        assert len(runner._pixels) == 1


@pytest.mark.parametrize("capturing", [False, True])
def test_attention_reads_the_prompt_only_and_without_a_mask(model, monkeypatch, capturing):
    """Not the whole static buffer: that costs time. With a mask, which transformers makes under capture, sdpa has no
    flash kernel."""
    ids, pixels = prompt(model)
    expected = eager(model, ids, pixels).logits[:, -1]
    made, seen = [], []
    layer = model.model.language_model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *call: seen.append(call[2]["attention_mask"]), with_kwargs=True)
    make, masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setitem(masks, "sdpa", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    logits = li.PrefillRunner(model, *ids.shape, max_new_tokens=50)(ids, pixels)
    assert seen == [None]
    assert not capturing or not made
    assert torch.allclose(logits, expected, rtol=0, atol=1e-12)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_eager_attention(stf):
    """Its mask is a tensor and must be as wide as the keys that attention gets."""
    stf.set_attn_implementation("eager")
    check(stf)


def test_a_list_of_layers_in_the_stock_model():
    check(build.stock(vision_feature_layer=[-2, 2]))


def test_tower_layers_that_run(stock, monkeypatch):
    ids, pixels = prompt(stock)
    ran, forward = [], CLIPEncoderLayer.forward
    monkeypatch.setattr(CLIPEncoderLayer, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    logits = [li.PrefillRunner(stock, *ids.shape, full_tower=full)(ids, pixels) for full in (False, True)]
    assert len(ran) == 5 + 6
    assert torch.equal(*logits)


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
            (lambda i, p: (i.masked_fill(i == 2, 0), p), ValueError, r"input_ids: .* padding, .* in rows \[0, 1\]"),
            (lambda i, p: (i, p, None, torch.tensor([1, 0])[:, None] * i), ValueError, r"padding, .* in rows \[1\]"),
            (
                lambda i, p: (i, p, None, i[:1] > 0),
                ValueError,
                r"attention_mask: expected shape \[2, 10\], got \[1, 10\]",
            ),
            (lambda i, p: (i, p[:1]), ValueError, "input_ids: found 8 image tokens .* 4 are needed"),
            (lambda i, p: (i, None), ValueError, "input_ids: found 8 image tokens .* 0 are needed"),
        ],
    )
    def test_calls(self, stf, change, error, message):
        ids, pixels = prompt(stf)
        with pytest.raises(error, match=message):
            li.PrefillRunner(stf, *ids.shape)(*change(ids, pixels))

    def test_a_stock_prompt_of_the_wrong_length(self, stock):
        ids, _ = build.prompt([1, 1], 4)
        with pytest.raises(ValueError, match="input_ids: found 8 image tokens, but 32 are needed"):
            li.PrefillRunner(stock, *ids.shape)(ids, build.pixels(2))

    @pytest.mark.parametrize(
        ("change", "batch", "seq_len", "error", "message"),
        [
            (lambda m: m.model, 1, 8, TypeError, "model: expected a LLaVA or LLaVA-STF ForConditionalGeneration, got"),
            (lambda m: m.train(), 1, 8, ValueError, "model: expected eval mode"),
            (lambda m: m, 0, 8, ValueError, "batch: expected an int of at least 1, got 0"),
            (lambda m: m, 1, 8.0, ValueError, r"seq_len: expected an int of at least 1, got 8.0"),
        ],
    )
    def test_construction(self, stf, change, batch, seq_len, error, message):
        with pytest.raises(error, match=message):
            li.PrefillRunner(change(stf), batch, seq_len)


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
