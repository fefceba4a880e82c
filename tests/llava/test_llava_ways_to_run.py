"""Broken if this fails: in 16 bit, in chunks, adapted, offloaded, compiled or with another attention it differs."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_integration.core import model as core_model
from llava_integration.core import tower
from tests.llava import build


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit(dtype):
    full, half = build.stf(torch.float32), build.stf(dtype)
    half.load_state_dict(full.state_dict())  # torch 2.11 draws other random numbers in 16 bit
    ids, mask = build.prompt([1, 2])
    expected = build.run(full, ids, build.pixels(3, torch.float32), mask).logits
    got = build.run(half, ids, build.pixels(3, dtype), mask).logits
    assert got.dtype == dtype
    assert (got.float() - expected)[mask.bool()].abs().max() < 0.1 * expected.abs().max()


class TestChunks:
    """On a CPU a video is encoded frame by frame: same tokens, in order, as all at once."""

    @pytest.mark.parametrize("grad", [False, True])
    def test_same_tokens(self, stf, monkeypatch, grad):
        ids, mask = build.prompt([2, 0, 3])
        pixels, batches = build.pixels(5), []
        stf.model.vision_tower.embeddings.register_forward_hook(lambda m, args, out: batches.append(len(out)))
        got = build.run(stf, ids, pixels, mask, grad=grad)
        assert batches == [1] * 5
        monkeypatch.setattr(core_model, "image_chunks", lambda _, pixel_values: (pixel_values,))
        expected = build.run(stf, ids, pixels, mask, grad=grad)
        assert batches[5:] == [5]
        assert torch.allclose(got.logits, expected.logits, rtol=0, atol=1e-12)
        assert torch.allclose(got.image_hidden_states, expected.image_hidden_states, rtol=0, atol=1e-12)

    def test_offloaded_weights_are_loaded_once(self, stf):
        assert [len(part) for part in tower.image_chunks(stf.model.vision_tower.to("meta"), build.pixels(3))] == [3]


def test_low_rank_adapters_on_the_projector():
    """PEFT replaces the projector's linears: the adapters must count, in place and plainly."""
    peft = pytest.importorskip("peft")
    stf, (ids, mask), pixels = build.stf(), build.prompt([1, 2]), build.pixels(3)
    before = build.run(stf, ids, pixels, mask).logits
    config = peft.LoraConfig(target_modules=r".*multi_modal_projector.*linear_\d", init_lora_weights=False)
    adapted = peft.get_peft_model(stf, config).double().eval()
    in_place, plain = (build.run(adapted, ids, pixels, mask, grad=grad).logits for grad in (False, True))
    assert torch.allclose(in_place, plain, atol=1e-10)
    assert not torch.allclose(in_place, before, atol=1e-3)
    assert torch.allclose(build.run(adapted.merge_and_unload(), ids, pixels, mask).logits, plain, atol=1e-10)


def test_the_whole_forward_compiles_to_two_graphs_without_a_break():
    """One for the first batch size, one for all others: no loop over chunks of images in the graph."""
    text, vision = build.llama(num_hidden_layers=1), build.clip(num_hidden_layers=1)
    stf = build.stf(torch.float32, vision=vision, text=text, vision_feature_layer=[1, 0])
    graphs = []
    compiled = torch.compile(stf, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for batch in (1, 2, 3, 4, 5):
            ids, _ = build.prompt([1] * batch)
            pixels = build.pixels(batch, torch.float32)
            logits = compiled(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            assert torch.allclose(logits, build.run(stf, ids, pixels).logits, atol=1e-5)
    assert len(graphs) <= 2


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
