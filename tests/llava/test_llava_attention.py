"""Broken if this fails: another attention implementation gives other logits, or gets a mask that it does not take."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.llava import build


def test_attention_implementations_agree(stf):
    assert stf._supports_flash_attn
    assert stf._supports_sdpa
    ids, _ = build.prompt([2, 2])
    expected = build.run(stf, ids, build.pixels(4)).logits
    stf.set_attn_implementation("eager")
    assert stf.model.vision_tower.config._attn_implementation == "eager"
    got = build.run(stf, ids, build.pixels(4)).logits
    assert torch.allclose(got, expected, atol=1e-6)  # eager takes softmax in fp32


def test_flash_attention_gets_what_it_takes(stf, monkeypatch):
    """A stand-in for the kernels: no mask or a 2D mask of the prompt, from the tower and the language model alike."""
    seen = []

    def flash(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
        causal = module.is_causal if is_causal is None else is_causal
        seen.append((type(module).__name__, attention_mask is None or attention_mask.ndim == 2))
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        mask = mask.tril() if causal else mask
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
            mask = mask | ~mask.any(-1, keepdim=True)  # rows of padding: anything but NaN
        repeat = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(repeat, 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return out.transpose(1, 2), None

    (ids, mask), pixels = build.prompt([1, 2]), build.pixels(3)
    expected = build.run(stf, ids, pixels, mask).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    for config in (stf.config, stf.config.text_config, stf.config.vision_config):
        config._attn_implementation_internal = "flash_attention_2"
    got = build.run(stf, ids, pixels, mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-10)
    assert set(seen) == {("CLIPAttention", True), ("LlamaAttention", True)}
