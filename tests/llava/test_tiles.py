"""Broken if this fails: a model of tiles is not the stock one with every tile's tokens averaged, or a model of some
family answers, learns, saves or refuses otherwise than its stock one would."""

import copy
import inspect
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_integration as li
from llava_integration.core.insertion import images_in_parts
from tests.llava import build, tiled

FAMILIES = pytest.mark.parametrize("family", tiled.ALL)
TILED = pytest.mark.parametrize("family", tiled.MODELS)
SIZES = [(60, 100), (100, 60), (7, 9)]
WINDOWS = [("next", 2, False), ("next", 3, True), ("next", 4, False), ("onevision", 3, False), ("onevision", 2, True)]


def close(ours, expected):
    assert [f.shape for f in ours] == [f.shape for f in expected]
    return all((a - b).abs().max() < 1e-12 * b.abs().max() for a, b in zip(ours, expected, strict=True))


def features(model, made):
    with torch.no_grad():
        return list(model.get_image_features(**made).pooler_output)


@TILED
def test_the_rules_written_here_are_those_of_the_stock_models(family):
    model = tiled.MODELS[family]()
    made = tiled.inputs(model, tiled.SIZES)
    assert close(features(model, made), tiled.expected(model, made, tiled.SIZES, 1))


@pytest.mark.parametrize(("family", "r", "truncate"), WINDOWS)
def test_features_are_the_packed_averages_of_the_stock_tokens(family, r, truncate):
    stock = tiled.MODELS[family]()
    stf = li.from_llava(stock, merge_size=r, truncate=truncate)
    made = tiled.inputs(stock, tiled.SIZES)
    assert close(features(stf, made), tiled.expected(stock, made, tiled.SIZES, r))


@TILED
def test_packing_makes_no_tensor_on_the_device_from_a_list(family):
    """That would wait for a GPU, and end the capture of a graph."""
    model, devices = li.from_llava(tiled.MODELS[family]()).model, []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.tensor:
                devices.append((kwargs or {}).get("device"))
            return function(*args, **(kwargs or {}))

    with Spy():
        model.image_token_counts(None, [(60, 100)])
    assert devices == [None]


@TILED
def test_counts(family):
    """For a set of drawn sizes and every window the processor counts what the model makes."""
    stock = tiled.MODELS[family]()
    for r, truncate in [(None, False), (2, True), (3, True)]:
        stf = li.from_llava(stock, merge_size=r, truncate=truncate)
        processor = tiled.stf_processor(stock, r)
        draw = torch.Generator().manual_seed(0)
        sizes = [tuple(size) for size in (torch.randint(2, 60, (80, 2), generator=draw) ** 1.6).long().tolist()]
        made = stf.model.image_token_counts(None, sizes)
        assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == made


def both(family, **changes):
    stock = tiled.ALL[family](**changes)
    return stock, li.from_llava(stock)


@FAMILIES
@pytest.mark.parametrize("groups", [[1, 1, 1], [2, 1], [1, 0, 2]], ids=str)
def test_logits_are_those_of_the_stock_language_model_on_the_packed_averages(family, groups):
    stock, stf = both(family)
    made = tiled.inputs(stock, SIZES)
    inputs = tiled.prompts(stf, made, groups)
    tokens = (inputs["input_ids"] == build.IMAGE_TOKEN).sum(1).tolist()
    assert images_in_parts(tokens, stf.model.image_token_counts(**made)) == groups
    with torch.no_grad():
        embeds = stock.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat(tiled.expected(stock, made, SIZES, stf.config.spatial_merge_size))
        embeds[inputs["input_ids"] == build.IMAGE_TOKEN] = features
        expected = stock(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        output = stf(**inputs)
    assert torch.allclose(output.logits, expected, atol=1e-11)
    assert torch.allclose(image_tokens(output), features, atol=1e-11)


def image_tokens(output):
    if "image_outputs" in output:  # since transformers 5.24
        return torch.cat(list(output.image_outputs.pooler_output))
    return output.image_hidden_states


def test_images_of_one_prompt_have_one_tile_each_as_onevision_has_it():
    stock, stf = both("onevision")
    made = tiled.inputs(stock, SIZES, together=True)
    assert made["batch_num_images"].tolist() == [3]
    counts = stf.model.image_token_counts(None, made["image_sizes"], made["batch_num_images"])
    assert counts == [3 * 3 + 1] * 3
    inputs = tiled.prompts(stf, made, [3])
    with torch.no_grad():
        features = image_tokens(stf(**inputs))
    assert torch.allclose(features, torch.cat(tiled.expected(stock, made, SIZES, 3)), atol=1e-11)


@pytest.mark.parametrize(("r", "truncate"), [(3, False), (2, True)])
def test_the_frames_of_a_video_have_their_windows_and_no_pooling_besides(r, truncate):
    stock = tiled.onevision_model()
    stf = li.from_llava(stock, merge_size=r, truncate=truncate)
    frames = build.pixels(2 * 3, size=130).unflatten(0, (2, 3))
    tokens = tiled.pooled(tiled.stock_tokens(stock, frames.flatten(0, 1)), r).flatten(1, 2)
    newline = stock.model.image_newline.expand(2, 1, -1)
    expected = torch.cat([tokens.unflatten(0, (2, 3)).flatten(1, 2), newline], dim=1)
    with torch.no_grad():
        videos = stf.get_video_features(frames).pooler_output
        ids = torch.full((2, expected.shape[1] + 2), tiled.VIDEO_TOKEN)
        ids[:, [0, -1]] = 9
        output = stf(input_ids=ids, pixel_values_videos=frames)
        made = stf.generate(input_ids=ids, pixel_values_videos=frames, max_new_tokens=2, min_new_tokens=2)
        assert "video_outputs" in output or torch.allclose(output.video_hidden_states, expected.flatten(0, 1))
        by_hand = stf.get_input_embeddings()(ids)
        by_hand[:, 1:-1] = expected
        logits = stf(inputs_embeds=by_hand).logits
    assert torch.allclose(videos, expected, atol=1e-11)
    assert torch.allclose(output.logits, logits, atol=1e-11)
    assert made[:, ids.shape[1]].tolist() == logits[:, -1].argmax(-1).tolist()


def test_a_video_in_a_prompt():
    """Its frames as the stock model's tower gets them, resized whole; the count is what the model needs."""
    stock, stf = both("onevision", dtype=torch.float32)
    processor = tiled.stf_processor(stock)
    frames = [build.image(seed, (70, 40)) for seed in range(3)]
    text, image = "a <unk> cat <image>", build.image(4, (60, 100))
    inputs = processor(text=text, videos=[frames], images=image, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 130, 130)
    base = tiled.processor(stock).image_processor(frames[1], return_tensors="pt")["pixel_values"][0, 0]
    assert torch.equal(inputs["pixel_values_videos"][0, 1], base)
    assert int((inputs["input_ids"] == tiled.VIDEO_TOKEN).sum()) == 3 * 9 + 1
    assert processor._get_num_multimodal_tokens(video_sizes=[(3, 40, 70)]).num_video_tokens == [3 * 9 + 1]
    with torch.no_grad():
        assert stf(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="videos: expected as many frames in each"):
        processor(text="<unk> <unk>", videos=[frames, frames[:2]], return_tensors="pt")


@TILED
def test_all_tiles_go_through_the_projector_at_once(family, monkeypatch):
    stock, stf = both(family)
    seen, forward = [], type(stf.model.multi_modal_projector).forward
    monkeypatch.setattr(
        type(stf.model.multi_modal_projector),
        "forward",
        lambda self, b, *a, **k: seen.append(len(b[0])) or forward(self, b, *a, **k),
    )
    with torch.no_grad():
        stf(**tiled.prompts(stf, tiled.inputs(stock, SIZES), [2, 1]))
    assert seen == [sum(math.prod(tiled.best_grid(stock.config, size)) + 1 for size in SIZES)]


@FAMILIES
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 7}], ids=str)
def test_generate(family, options):
    """Its first token is that of forward, whatever batch, mode and images of a prompt."""
    stock, stf = both(family)
    if "prefill_chunk_size" in options and "mm_encoder_outputs" not in inspect.signature(stf.forward).parameters:
        options = {}  # transformers 5.17 gives every chunk all images
    inputs = tiled.prompts(stf, tiled.inputs(stock, SIZES), [2, 1])
    torch.manual_seed(0)
    made = stf.generate(**inputs, **{"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | options)
    assert made.shape == (2, inputs["input_ids"].shape[1] + 4)
    if not options or "prefill_chunk_size" in options:
        logits = stf(**inputs).logits[:, -1]
        logits[:, build.IMAGE_TOKEN] = logits[:, 3] = -math.inf  # suppressed; the end of the text
        assert made[:, -4].tolist() == logits.argmax(-1).tolist()
    if "num_beams" in options:
        alone = [
            stf.generate(**one(inputs, slice(*cut), row), num_beams=3, max_new_tokens=4, min_new_tokens=4)
            for row, cut in enumerate([(0, 2), (2, 3)])
        ]
        assert [row[-4:].tolist() for row in made] == [row[0, -4:].tolist() for row in alone]


def one(inputs, images, row):
    """The inputs of one prompt of a batch."""
    kept = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
    return kept | {name: inputs[name][images] for name in inputs.keys() - kept.keys()}


@FAMILIES
@pytest.mark.parametrize("images", [1, 0])
def test_images_that_the_cache_holds_may_be_passed_again(family, images):
    """The pixels of a second turn, or of the whole conversation; a sampled image token is in the first."""
    stock, stf = both(family)
    made = tiled.inputs(stock, SIZES * 2)

    def images_of(*order):
        return {name: value[list(order)] for name, value in made.items()}

    inputs, turn = tiled.prompts(stf, images_of(0, 1, 2), [2, 1]), tiled.prompts(stf, images_of(3, 4), [images] * 2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    first = stf.generate(**inputs, **options, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    ids[0, inputs["input_ids"].shape[1]] = build.IMAGE_TOKEN
    caches = (first.past_key_values, copy.deepcopy(first.past_key_values))
    ways = (images_of(3, 4), images_of(0, 1, 3, 2, 4)) if images else ({}, images_of(0, 1, 2))
    new, whole = (
        stf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **way, past_key_values=cache, **options)
        for way, cache in zip(ways, caches, strict=True)
    )
    assert torch.equal(new, whole)


@FAMILIES
def test_every_projector_weight_learns_within_two_steps(family):
    stock, stf = both(family)
    projector = stf.train().requires_grad_(False).model.multi_modal_projector.requires_grad_(True)
    before = copy.deepcopy(projector.state_dict())
    inputs = tiled.prompts(stf, tiled.inputs(stock, SIZES[:2]), [1, 1])
    optimizer = torch.optim.SGD(projector.parameters(), lr=1e-1)
    for _ in range(2):
        optimizer.zero_grad()
        stf(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    for name, after in projector.state_dict().items():
        assert (after != before[name]).double().mean() > 0.99, name


@FAMILIES
def test_gradient_checkpointing_changes_nothing_and_recomputes_tower_and_language_model(family):
    stock, stf = both(family)
    inputs, ran, grads, runs = tiled.prompts(stf, tiled.inputs(stock, SIZES[:1]), [1]), [], [], []
    stf.model.vision_tower.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: ran.append("tower"))
    stf.model.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: ran.append("text"))
    for checkpointing in (False, True):
        ran.clear()
        stf.zero_grad()
        if checkpointing:
            stf.train().gradient_checkpointing_enable({"use_reentrant": False})
        stf(**inputs, labels=inputs["input_ids"]).loss.backward()
        runs.append((ran.count("text"), ran.count("tower")))
        named = stf.named_parameters()
        grads.append({name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None})
    assert runs[1] == (2, 2 * runs[0][1])
    assert grads[0].keys() == grads[1].keys()
    assert family == "llava" or "model.image_newline" in grads[0]
    layers = {int(name.split(".")[4]) for name in grads[0] if name.startswith("model.vision_tower.encoder.layers.")}
    assert layers == set(range(max(stf.config.vision_feature_layer))), "gradients reach every layer that is read"
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-12) for name in grads[0])


@FAMILIES
def test_saved_and_loaded(family, tmp_path):
    stock, stf = both(family, dtype=torch.float32)
    stf.save_pretrained(tmp_path)
    assert build.same_state(build.load(tmp_path, AutoModelForImageTextToText), stf)
    made = tiled.stf_processor(stock)
    made.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(made)
    images = [build.image(1, size[::-1]) for size in SIZES]
    text = ["<image> cat", "is <image> the picture", "<image>"]
    inputs, first = (each(images=images, text=text, return_tensors="pt", padding=True) for each in (again, made))
    assert inputs.keys() == first.keys()
    for name in inputs:  # where torchvision is installed, what is loaded resizes with it
        assert torch.allclose(inputs[name].double(), first[name].double(), rtol=0, atol=0.05), name
    with torch.no_grad():
        stf(**inputs)


@TILED
@pytest.mark.parametrize("together", [False, True])
def test_runner(family, together):
    """Logits of the model's own forward, of the stock one too; one graph would serve one set of sizes."""
    for model in both(family):
        made = tiled.inputs(model, SIZES[:2], together)
        with torch.no_grad():
            tokens = sum(len(image) for image in model.get_image_features(**made).pooler_output)
            ids = torch.full((1, tokens + 5), build.IMAGE_TOKEN)
            ids[:, :2], ids[:, -3:] = 9, 11
            expected = model(input_ids=ids, **made).logits[:, -1]
        runner = li.PrefillRunner(model, *ids.shape, max_new_tokens=2)
        assert torch.allclose(runner(ids, **made), expected, atol=1e-11)
        with pytest.raises(ValueError, match="image_sizes: expected"):
            runner(ids, made["pixel_values"])


class TestRefusals:
    @TILED
    def test_sizes_that_do_not_match_the_tiles(self, family):
        stock, stf = both(family)
        made = tiled.inputs(stock, SIZES)
        ids = tiled.prompts(stf, made, [1, 1, 1])["input_ids"]
        for wrong in (made["image_sizes"][:2], torch.tensor([[5, 400]] * 3), None):
            with pytest.raises(ValueError, match="image_sizes: expected"):
                stf(input_ids=ids, pixel_values=made["pixel_values"][:, :3], image_sizes=wrong)
        fewer = ids.clone()
        fewer[0, ids[0].tolist().index(build.IMAGE_TOKEN)] = 9
        for call in (stf, stf.generate):
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                call(input_ids=fewer, **made)
        with pytest.raises(ValueError, match="pixel_values: expected"):
            stf(input_ids=ids, pixel_values=made["pixel_values"][..., 1:], image_sizes=made["image_sizes"])
        strategy = {"default": "full", "full": "default"}[stf.config.vision_feature_select_strategy]
        with pytest.raises(ValueError, match="vision_feature_select_strategy: expected"):
            stf.get_image_features(**made, vision_feature_select_strategy=strategy)

    def test_a_video_for_a_model_without_video(self):
        stock, stf = both("next")
        frames = torch.zeros(1, 2, 3, build.PIXELS, build.PIXELS)
        ids = torch.tensor([[5, 6, 7]])
        with pytest.raises(ValueError, match="pixel_values_videos: expected none"):
            stf(input_ids=ids, pixel_values_videos=frames)
        with pytest.raises(ValueError, match="videos: expected none"):
            tiled.stf_processor(stock)(text="USER", videos=[frames[0]])

    def test_processors(self):
        stock = tiled.next_model()
        processor = tiled.processor(stock)
        with pytest.raises(ValueError, match="merge_size: expected an int from 1 to 4"):
            li.LlavaNextStfProcessor.from_llava(processor, merge_size=5)
        with pytest.raises(TypeError, match="processor: expected a LlavaOnevisionProcessor, got LlavaNextProcessor"):
            li.LlavaOnevisionStfProcessor.from_llava(processor)
