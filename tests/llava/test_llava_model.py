"""Broken if this fails: LLaVA-STF is not its definition, or some way to run it gives other tokens."""

import functools
import inspect

import pytest
import torch
from transformers import LlavaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import reference
from llava_integration import modeling, vision_tower
from llava_integration.placement import image_rows


def run(model, ids, pixels, mask=None, grad=False):
    with torch.set_grad_enabled(grad):
        return model(input_ids=ids, pixel_values=pixels, attention_mask=mask)


def with_reference(model, monkeypatch):
    """The same model and weights with the projector of reference/."""
    monkeypatch.setattr(modeling, "CompactTokenProjector", reference.CompactTokenProjector)
    other = type(model)(model.config).eval().to(model.dtype)
    other.load_state_dict(model.state_dict())
    assert type(other.model.multi_modal_projector) is reference.CompactTokenProjector
    return other


def generate(model, ids, mask, pixels, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)


def test_image_features_from_the_definition(build, stf):
    """Concatenate the stock tower's hidden states, run the reference projector, compare."""
    pixels = build.pixels(2)
    config, projector = stf.config, stf.model.multi_modal_projector
    oracle = reference.CompactTokenProjector(3, 32, 48, skip_tokens=1, dtype=torch.float64)
    oracle.load_state_dict(projector.state_dict())
    with torch.no_grad():
        hidden = stf.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        expected = oracle([hidden[i] for i in config.vision_feature_layer], (4, 4))
        got = torch.stack(list(stf.get_image_features(pixel_values=pixels).pooler_output))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_blocks_are_views_of_the_hidden_states(build, stf):
    """No concatenation and no crop: the projector receives the hidden states themselves, CLS included."""
    seen = []
    stf.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    layer_outputs = [None]
    for layer in stf.model.vision_tower.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: layer_outputs.append(output))
    stf.get_image_features(pixel_values=build.pixels(1))
    assert [block is layer_outputs[i] for block, i in zip(seen, [5, 3, 1], strict=True)] == [True] * 3
    assert len(layer_outputs) == 6, "layer 6 is deeper than any block and must not run"


class TestInsertion:
    """The projector writes into inputs_embeds where nobody can tell, and only there."""

    def spy(self, model, monkeypatch):
        calls, original = [], type(model.model.multi_modal_projector).forward

        def forward(projector, *args, **kwargs):
            calls.append(kwargs.get("out") is not None)
            return original(projector, *args, **kwargs)

        monkeypatch.setattr(type(model.model.multi_modal_projector), "forward", forward)
        return calls

    def test_writing_in_place_equals_plain_insertion(self, build, stf, monkeypatch):
        ids, mask = build.prompt([2, 0, 1])
        pixels, calls = build.pixels(3), self.spy(stf, monkeypatch)
        in_place, plain = run(stf, ids, pixels, mask), run(stf, ids, pixels, mask, grad=True)
        assert calls == [True, False]
        assert torch.allclose(in_place.logits, plain.logits, rtol=0, atol=1e-12)
        assert torch.allclose(in_place.image_hidden_states, plain.image_hidden_states, rtol=0, atol=1e-12)

    def test_a_wrong_row_shows(self, build, stf, monkeypatch):
        """The comparison above can fail: shift the rows by one and it does."""
        ids, mask = build.prompt([2, 0, 1])
        pixels = build.pixels(3)
        expected = run(stf, ids, pixels, mask).logits
        monkeypatch.setattr(modeling, "image_rows", lambda mask, count: image_rows(mask, count) + 1)
        assert not torch.allclose(run(stf, ids, pixels, mask).logits, expected, atol=1e-6)

    def test_embedding_weights_are_not_written(self, build, stf):
        before = stf.get_input_embeddings().weight.clone()
        run(stf, *((build.prompt([1])[0]), build.pixels(1)))
        assert torch.equal(stf.get_input_embeddings().weight, before)

    @pytest.mark.parametrize("watcher", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hooks_see_the_projector_as_usual(self, build, stf, monkeypatch, watcher):
        calls = self.spy(stf, monkeypatch)
        getattr(stf.model.multi_modal_projector, watcher)(lambda *_: None)
        run(stf, build.prompt([1])[0], build.pixels(1))
        assert calls == [False]

    def test_another_dtype_is_inserted_plainly(self, build, monkeypatch):
        stf = build.stf(torch.float32)
        calls = self.spy(stf, monkeypatch)
        stf.model.language_model.double()
        stf.lm_head.double()
        assert torch.isfinite(run(stf, build.prompt([1])[0], build.pixels(1, torch.float32)).logits).all()
        assert calls == [False]

    def test_autocast_is_inserted_plainly(self, build, monkeypatch):
        stf = build.stf(torch.float32)
        calls = self.spy(stf, monkeypatch)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(run(stf, build.prompt([1])[0], build.pixels(1, torch.float32)).logits).all()
        assert calls == [False]

    def test_rows_of_a_mask(self):
        mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
        assert image_rows(mask, 4).tolist() == [1, 3, 8, 9]
        assert image_rows(mask, 0).tolist() == []


def test_inputs_embeds_with_pixels(build, stf):
    ids, _ = build.prompt([2])
    pixels = build.pixels(2)
    with torch.no_grad():
        embeds = stf.get_input_embeddings()(ids)
        kept = embeds.clone()
        logits = stf(inputs_embeds=embeds, pixel_values=pixels).logits
    assert torch.allclose(logits, run(stf, ids, pixels).logits, atol=1e-12)
    assert torch.equal(embeds, kept), "the caller's inputs_embeds were written"


def test_encoded_images_may_be_passed_on(build, stf):
    ids, _ = build.prompt([2])
    pixels = build.pixels(2)
    with torch.no_grad():
        encoded = {"image": stf.get_image_features(pixel_values=pixels)}
        logits = stf.model(input_ids=ids, mm_encoder_outputs=encoded).last_hidden_state
        assert torch.allclose(logits, stf.model(input_ids=ids, pixel_values=pixels).last_hidden_state, atol=1e-12)


def test_gradients_reach_every_part(build, stf):
    ids, mask = build.prompt([1, 2])
    stf.train()
    labels = ids.masked_fill(ids == build.image_token, -100)
    stf(input_ids=ids, attention_mask=mask, pixel_values=build.pixels(3), labels=labels).loss.backward()
    tower = stf.model.vision_tower
    for part in (stf.model.multi_modal_projector, stf.model.language_model.layers[0], tower.encoder.layers[4]):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in tower.encoder.layers[5].parameters())


def test_gradient_checkpointing(build, stf):
    ids, mask = build.prompt([1])
    pixels = build.pixels(1)
    stf.train()

    def gradient():
        stf.zero_grad()
        stf(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=ids).loss.backward()
        return stf.model.multi_modal_projector.mbtf.linear_1.weight.grad.clone()

    expected = gradient()
    stf.gradient_checkpointing_enable({"use_reentrant": False})
    assert stf.model.vision_tower.encoder.layers[0].gradient_checkpointing
    assert torch.allclose(gradient(), expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit(build, dtype):
    full, half = build.stf(torch.float32), build.stf(dtype)
    half.load_state_dict(full.state_dict())  # torch 2.11 draws other random numbers in 16 bit
    ids, mask = build.prompt([1, 2])
    expected = run(full, ids, build.pixels(3, torch.float32), mask).logits
    got = run(half, ids, build.pixels(3, dtype), mask).logits
    assert got.dtype == dtype
    assert (got.float() - expected)[mask.bool()].abs().max() < 0.1 * expected.abs().max()


def test_attention_implementations_agree(build, stf):
    ids, _ = build.prompt([2, 2])
    expected = run(stf, ids, build.pixels(4)).logits
    stf.set_attn_implementation("eager")
    assert stf.model.vision_tower.config._attn_implementation == "eager"
    assert torch.allclose(run(stf, ids, build.pixels(4)).logits, expected, atol=1e-6)  # eager takes softmax in fp32


def test_flash_attention_gets_what_it_takes(build, stf, monkeypatch):
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
    expected = run(stf, ids, pixels, mask).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    for config in (stf.config, stf.config.text_config, stf.config.vision_config):
        config._attn_implementation_internal = "flash_attention_2"
    got = run(stf, ids, pixels, mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-10)
    assert set(seen) == {("CLIPAttention", True), ("LlamaAttention", True)}


def test_attention_may_be_chosen_for_tower_and_language_model_apart(build, stf, tmp_path):
    stf.save_pretrained(tmp_path)
    choice = {"vision_config": "eager", "text_config": "sdpa"}
    loaded = type(stf).from_pretrained(tmp_path, attn_implementation=choice)
    assert loaded.model.vision_tower.config._attn_implementation == "eager"
    assert loaded.model.language_model.config._attn_implementation == "sdpa"
    assert stf._supports_flash_attn
    assert stf._supports_sdpa


class TestChunks:
    """On a CPU a video is encoded a few frames at a time: same tokens, in order, as all at once."""

    @pytest.mark.parametrize("frames", [1, 2, 3])
    @pytest.mark.parametrize("grad", [False, True])
    def test_same_tokens(self, build, stf, monkeypatch, frames, grad):
        ids, mask = build.prompt([2, 0, 3])
        pixels, batches = build.pixels(5), []
        expected = run(stf, ids, pixels, mask, grad=grad)
        monkeypatch.setattr(vision_tower, "CPU_ACTIVATION_BYTES", frames * 17 * 48 * 8)
        stf.model.vision_tower.embeddings.register_forward_hook(lambda m, args, out: batches.append(len(out)))
        got = run(stf, ids, pixels, mask, grad=grad)
        assert batches == [frames] * (5 // frames) + [5 % frames] * (5 % frames > 0)
        assert torch.allclose(got.logits, expected.logits, rtol=0, atol=1e-12)
        assert torch.allclose(got.image_hidden_states, expected.image_hidden_states, rtol=0, atol=1e-12)

    def test_at_least_one_frame(self, build, stf, monkeypatch):
        monkeypatch.setattr(vision_tower, "CPU_ACTIVATION_BYTES", 1)
        assert [len(part) for part in vision_tower.image_chunks(stf.model.vision_tower, build.pixels(3))] == [1, 1, 1]

    def test_offloaded_weights_are_loaded_once(self, build, stf, monkeypatch):
        monkeypatch.setattr(vision_tower, "CPU_ACTIVATION_BYTES", 1)
        tower = stf.model.vision_tower.to("meta")
        assert [len(part) for part in vision_tower.image_chunks(tower, build.pixels(3))] == [3]


class TestGenerate:
    """Fused and reference projector give the same tokens in every mode."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7},
            {"cache_implementation": "static"},
            {"use_cache": False},
        ],
        ids=lambda options: "-".join(options) or "greedy",
    )
    def test_same_tokens_from_fused_and_reference(self, build, stf, monkeypatch, options):
        ids, mask = build.prompt([2, 1])
        options = dict(options)
        ours = generate(stf, ids, mask, build.pixels(3), **options)
        assert ours.shape[1] == ids.shape[1] + 6
        assert torch.equal(ours, generate(with_reference(stf, monkeypatch), ids, mask, build.pixels(3), **options))

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
    def test_a_batch_gives_what_each_prompt_gives_alone(self, build, stf, options):
        """Left padding, and two, none and one image: images must reach their own prompt, in every beam."""
        counts, pixels = [2, 0, 1], build.pixels(3)
        ids, mask = build.prompt(counts)
        options = options | {"return_dict_in_generate": True, "output_scores": True}
        beams = options.get("num_beams", 1)
        batched = generate(stf, ids, mask, pixels, **options)
        start = 0
        for row, count in enumerate(counts):
            own = pixels[start : start + count] if count else None
            kept = mask[row] == 1
            alone = generate(stf, ids[row : row + 1, kept], mask[row : row + 1, kept], own, **options)
            assert torch.equal(batched.sequences[row, -6:], alone.sequences[0, -6:]), row
            for ours, theirs in zip(batched.scores, alone.scores, strict=True):
                assert torch.allclose(ours[row * beams : (row + 1) * beams], theirs, atol=1e-9), row
            start += count

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
    def test_every_beam_sees_the_images_in_order(self, build, stf, options):
        ids, mask = build.prompt([2, 0, 1])
        out = generate(stf, ids, mask, build.pixels(3), return_dict_in_generate=True, output_logits=True, **options)
        first = out.logits[0].unflatten(0, (3, 3))
        expected = run(stf, ids, build.pixels(3), mask).logits[:, -1]
        assert torch.allclose(first, expected[:, None].to(first).expand_as(first), atol=1e-6)

    @pytest.mark.parametrize("images", [1, 0])
    def test_a_second_turn_on_the_cache_of_the_first(self, build, stf, images):
        """The whole conversation as ids, and the pixels of the new turn only, as generate takes them with a cache."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2 + images)
        first = generate(stf, ids, mask, pixels[:2], return_dict_in_generate=True)
        turn = build.prompt([images])[0]
        both = torch.cat([first.sequences, turn], dim=1)
        mask = torch.ones_like(both)
        own = pixels[2:] if images else None
        second = generate(stf, both, mask, own, past_key_values=first.past_key_values)
        assert torch.equal(second, generate(stf, both, mask, pixels))

    @pytest.mark.parametrize("images", [[2], [0]], ids=str)
    @pytest.mark.parametrize("draft", ["self", "copy"])
    def test_assisted_by_a_draft_model_that_sees_the_images(self, build, stf, images, draft):
        """A draft model with the same weights guesses right every time: one pass of the model for all its tokens."""
        ids, mask = build.prompt(images)
        pixels = build.pixels(2) if images[0] else None
        plain = generate(stf, ids, mask, pixels)
        assistant, passes = build.stf() if draft == "copy" else stf, []
        options = {"num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
        assistant.generation_config.update(assistant_confidence_threshold=0.0, **options)
        stf.model.language_model.register_forward_hook(lambda *_: passes.append(1))
        assert torch.equal(generate(stf, ids, mask, pixels, assistant_model=assistant), plain)
        if draft == "copy":
            assert len(passes) <= 2

    @pytest.mark.parametrize("size", [1, 3, 7, 12, 17])
    def test_prefill_in_chunks_that_cut_images(self, build, stf, size):
        """Where transformers passes encoded images on, chunk by chunk; before that it repeats them: refused."""
        (ids, mask), pixels = build.prompt([2]), build.pixels(2)
        expected = generate(stf, ids, mask, pixels)
        chunked = functools.partial(generate, stf, ids, mask, pixels, prefill_chunk_size=size)
        if "mm_encoder_outputs" in inspect.signature(LlavaModel.forward).parameters or size >= ids.shape[1]:
            assert torch.equal(chunked(), expected)
        else:
            with pytest.raises(ValueError, match=r"image tokens .* 8 are needed for 2 image\(s\)"):
                chunked()

    def test_greedy_by_hand(self, build, stf):
        ids, mask = build.prompt([2])
        pixels, tokens = build.pixels(2), []
        grown = ids
        for _ in range(6):
            logits = run(stf, grown, pixels).logits[:, -1]
            logits[:, [3, build.image_token]] = -torch.inf
            tokens.append(logits.argmax(-1, keepdim=True))
            grown = torch.cat([grown, tokens[-1]], dim=1)
        expected = generate(stf, ids, mask, pixels, suppress_tokens=[3, build.image_token])[:, -6:]
        assert torch.equal(torch.cat(tokens, dim=1), expected)

    def test_the_image_matters(self, build, stf):
        ids, _ = build.prompt([1])
        one, other = (run(stf, ids, p).logits[:, -1] for p in build.pixels(2).split(1))
        assert (one - other).abs().max() > 1e-3

    def test_text_only(self, build, stf):
        ids, mask = build.prompt([0, 0], length=5)
        assert generate(stf, ids, mask, None).shape == (2, 11)


class TestGeometries:
    """Other towers, windows and halves of the projector that the paper compares."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"spatial_merge_size": 1},
            {"spatial_merge_size": 4},
            {"vision_feature_layer": [6]},
            {"vision_feature_layer": [4], "use_mbtf": False},
            {"vision_feature_layer": [0, 6, 2, 2]},
            {"multimodal_projector_bias": False},
            {"projector_hidden_act": "silu", "mbtf_hidden_size": 40, "stf_hidden_size": 24},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("tower", ["clip", "siglip"])
    def test_runs_and_equals_the_reference(self, build, monkeypatch, tower, changes):
        vision = getattr(build, tower)(num_hidden_layers=6)
        stf = build.stf(vision=vision, **changes)
        per_image = stf.config.image_seq_length
        assert per_image == (4 // stf.config.spatial_merge_size) ** 2
        ids, mask = build.prompt([1, 2], per_image)
        expected = run(with_reference(stf, monkeypatch), ids, build.pixels(3), mask).logits
        assert torch.allclose(run(stf, ids, build.pixels(3), mask).logits, expected, atol=1e-10)

    def test_truncated_grid(self, build, monkeypatch):
        stf = build.stf(vision=build.siglip(image_size=70), spatial_merge_truncate=True)
        ids, _ = build.prompt([1])
        pixels = build.pixels(1, size=70)
        expected = run(with_reference(stf, monkeypatch), ids, pixels).logits
        assert torch.allclose(run(stf, ids, pixels).logits, expected, atol=1e-10)


def test_low_rank_adapters_on_the_projector(build):
    """PEFT replaces the projector's linears: the adapters must count, in place and plainly."""
    peft = pytest.importorskip("peft")
    stf, (ids, mask), pixels = build.stf(), build.prompt([1, 2]), build.pixels(3)
    before = run(stf, ids, pixels, mask).logits
    config = peft.LoraConfig(target_modules=r".*multi_modal_projector.*linear_\d", init_lora_weights=False)
    adapted = peft.get_peft_model(stf, config).double().eval()
    in_place, plain = run(adapted, ids, pixels, mask).logits, run(adapted, ids, pixels, mask, grad=True).logits
    assert torch.allclose(in_place, plain, atol=1e-10)
    assert not torch.allclose(in_place, before, atol=1e-3)
    assert torch.allclose(run(adapted.merge_and_unload(), ids, pixels, mask).logits, plain, atol=1e-10)


def test_offloaded_weights(build):
    """accelerate leaves parameters on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    stf, (ids, mask), pixels = build.stf(), build.prompt([1, 2]), build.pixels(3)
    expected = run(stf, ids, pixels, mask).logits
    accelerate.cpu_offload(stf, execution_device="cpu")
    assert next(stf.model.multi_modal_projector.parameters()).is_meta
    assert torch.allclose(run(stf, ids, pixels, mask).logits, expected, atol=1e-10)


def test_tower_and_projector_compile_without_a_graph_break(build):
    stf = build.stf(torch.float32, vision=build.clip(num_hidden_layers=1), vision_feature_layer=[1, 0])
    project = torch.compile(stf.model.project_images, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for count in (1, 3):
            pixels = build.pixels(count, torch.float32)
            assert torch.allclose(project(pixels), stf.model.project_images(pixels), atol=1e-5)


def test_the_whole_forward_compiles_to_two_graphs_without_a_break(build, monkeypatch):
    """One for the first batch size, one for all others: no loop over chunks of images in the graph."""
    monkeypatch.setattr(vision_tower, "CPU_ACTIVATION_BYTES", 1)
    text, vision = build.text(num_hidden_layers=1), build.clip(num_hidden_layers=1)
    stf = build.stf(torch.float32, vision=vision, text=text, vision_feature_layer=[1, 0])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(stf, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch in (1, 2, 3, 4, 5):
            ids, _ = build.prompt([1] * batch)
            pixels = build.pixels(batch, torch.float32)
            logits = compiled(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            assert torch.allclose(logits, run(stf, ids, pixels).logits, atol=1e-5)
    assert len(graphs) <= 2


class TestBadInput:
    """What does not fit is named before anything runs."""

    @pytest.mark.parametrize("path", ["in place", "plain"])
    @pytest.mark.parametrize(("images", "found", "needed"), [([2], 8, 4), ([1], 4, 8), ([0], 0, 4)])
    def test_counts_that_do_not_match(self, build, stf, images, found, needed, path):
        ids, _ = build.prompt(images)
        ran = []
        stf.model.vision_tower.embeddings.register_forward_hook(lambda *_: ran.append(1))
        stf.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError, match=rf"found {found} image tokens .* {needed} are needed.*LlavaStfProcessor"):
            run(stf, ids, build.pixels(needed // 4), grad=path == "plain")
        assert not ran, "something ran before the check"

    def test_a_prompt_of_the_stock_processor(self, build, stf):
        ids, _ = build.prompt([1], per_image=16)
        with pytest.raises(ValueError, match=r"found 16 image tokens .* 4 are needed for 1 image"):
            generate(stf, ids, torch.ones_like(ids), build.pixels(1))

    def test_images_that_were_forgotten(self, build, stf):
        with pytest.raises(ValueError, match=r"found 4 image tokens .* 0 are needed"):
            run(stf, build.prompt([1])[0], None)

    def test_beams_with_counts_that_do_not_match(self, build, stf):
        ids, mask = build.prompt([2])
        with pytest.raises(ValueError, match="found 8 image tokens"):
            generate(stf, ids, mask, build.pixels(1), num_beams=2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_sizes": torch.tensor([[56, 56]])}, "image_sizes: expected None"),
            ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: expected 'default'"),
            ({"vision_feature_layer": [5, 3]}, "vision_feature_layer: expected 3 layers"),
            ({"vision_feature_layer": [5, 3, 9]}, "vision_feature_layer: expected layers from -7 to 6"),
            (
                {"inputs_embeds": torch.zeros(1, 4, 48)},
                "input_ids, inputs_embeds: expected exactly one of them, got both",
            ),
            ({"input_ids": None}, "input_ids, inputs_embeds: expected exactly one of them, got none"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_options(self, build, stf, options, message):
        options = {"input_ids": build.prompt([1])[0], "pixel_values": build.pixels(1)} | options
        with pytest.raises(ValueError, match=message):
            stf(**options)

    def test_pixels_and_encoded_images(self, build, stf):
        pixels = build.pixels(1)
        encoded = {"image": stf.get_image_features(pixel_values=pixels)}
        with pytest.raises(ValueError, match="pixel_values, mm_encoder_outputs: expected at most one"):
            stf.model(input_ids=build.prompt([1])[0], pixel_values=pixels, mm_encoder_outputs=encoded)

    def test_pixels_of_another_size(self, build, stf):
        with pytest.raises(ValueError, match=r"pixel_values: expected \[images, 3, 56, 56\]"):
            run(stf, build.prompt([1])[0], build.pixels(1, size=70))

    def test_no_image_at_all(self, build, stf):
        with pytest.raises(ValueError, match="pixel_values: expected at least one image or None, got no image"):
            run(stf, build.prompt([0])[0], build.pixels(0))

    def test_another_layer_may_be_asked_for(self, build, stf):
        pixels = build.pixels(1)
        one = stf.model.project_images(pixels, [5, 3, 1])
        other = stf.model.project_images(pixels, [-2, 3, 2])
        assert torch.equal(one, stf.model.project_images(pixels))
        assert not torch.allclose(one, other)
