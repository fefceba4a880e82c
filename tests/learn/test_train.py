"""If this fails, `python -m llava_integration.train` does not train what its recipes say, or loses a run."""

import json
import re

import pytest
import torch
from support.processes import python
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_integration as li
from llava_integration import train, train_data
from llava_integration.core.register import family_of
from llava_integration.train_cache import FeatureCache, accept_blocks
from stf_kernels.command import BadInput
from tests.learn.conftest import TEMPLATE, record, write_data
from tests.llava import build, tiled

ASKED, ANSWERED = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}
QUIET = ["--use_cpu", "--disable_tqdm", "True", "--per_device_train_batch_size", "2", "--batch", "4"]


@pytest.fixture
def run(tmp_path, data):
    """Train into tmp_path/NAME -> exit code."""

    def run(recipe, model, name="out", *options, steps=6, data=data):
        paths = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / name)]
        return train.main([recipe, *paths, *QUIET, "--max_steps", str(steps), *options])

    return run


def losses(folder):
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    history = json.loads(states[-1].read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def state(folder):
    return build.load(folder).state_dict()


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


class TestRecipes:
    @pytest.mark.parametrize("start", ["warm", "random"])
    def test_the_loss_falls_and_the_projector_alone_moves(self, run, tmp_path, stock_folder, start):
        """From a LLaVA-1.5, so that the projector in the end is one of an LLaVA-STF."""
        options = ["--learning_rate", "1e-2", *["--from-random"] * (start == "random")]
        assert run("pretrain", stock_folder, "out", *options, steps=12) == 0
        found = losses(tmp_path / "out")
        assert found[-1] < 0.95 * found[0], found
        before = li.from_llava(LlavaForConditionalGeneration.from_pretrained(stock_folder)).state_dict()
        model, processor = build.load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
        assert changed(before, model.state_dict()) == {name for name in before if ".multi_modal_projector." in name}
        inputs = processor(images=build.image(), text="USER <image> what is in ASSISTANT", return_tensors="pt")
        assert (inputs.input_ids == build.IMAGE_TOKEN).sum() == 4
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1

    def test_finetuning_moves_the_language_model_too(self, run, tmp_path, stf_folder):
        assert run("finetune", stf_folder, "out", "--learning_rate", "1e-2") == 0
        moved = changed(state(stf_folder), state(tmp_path / "out"))
        assert {name.split(".")[1] for name in moved} == {"multi_modal_projector", "language_model", "weight"}

    @pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
    def test_rates_and_batches_are_the_papers(self, recipe, tmp_path):
        paths = ["--model", "m", "--data", "d", "--output", str(tmp_path)]
        args = train.parser().parse_args([recipe, *paths, "--per_device_train_batch_size", "4"])
        found = train.training_arguments(args, ["--use_cpu"])
        rate, batch = {"pretrain": (1e-3, 256), "finetune": (2e-5, 128)}[recipe]
        assert (found.learning_rate, 4 * found.gradient_accumulation_steps) == (rate, batch)
        assert (found.lr_scheduler_type, found.warmup_steps, found.weight_decay) == ("cosine", 0.03, 0)


class TestResuming:
    def test_an_interrupted_run_ends_as_the_uninterrupted(self, run, tmp_path, stock_folder, monkeypatch):
        """In the middle of an epoch, where the records are left that it has not seen. Of the half-written newest
        checkpoint nothing is used."""
        options = ["--learning_rate", "1e-2", "--save_steps", "1"]
        assert run("finetune", stock_folder, "whole", *options) == 0
        collate, calls = train_data.Collator.__call__, []

        def interrupted(self, items):
            calls.append(items)
            if len(calls) > 7:
                raise KeyboardInterrupt
            return collate(self, items)

        monkeypatch.setattr(train_data.Collator, "__call__", interrupted)
        assert run("finetune", stock_folder, "parts", *options) == 130
        monkeypatch.undo()
        assert len(losses(tmp_path / "parts")) == 3
        (tmp_path / "parts" / "checkpoint-5").mkdir()
        assert run("finetune", stock_folder, "parts", *options, "--resume") == 0
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
        assert not changed(state(tmp_path / "whole"), state(tmp_path / "parts"))

    def test_the_folder_of_another_run_is_refused(self, run, tmp_path, stf_folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".run.json.7").touch()  # of a run that was killed before it had a run.json
        assert run("pretrain", stf_folder, "out", steps=1) == 0
        with pytest.raises(BadInput, match="--resume goes on with its run"):
            run("pretrain", stf_folder, "out", steps=1)
        with pytest.raises(BadInput, match=r"learning_rate 0\.001, now 0\.5"):
            run("pretrain", stf_folder, "out", "--learning_rate", "0.5", "--resume", steps=1)

    def test_a_full_disk_leaves_the_last_checkpoint(self, run, tmp_path, stf_folder, monkeypatch, capsys):
        save = torch.save

        def full(found, path, *args, **options):
            if "checkpoint-4" in str(path):
                raise OSError(28, "No space left on device")
            save(found, path, *args, **options)

        monkeypatch.setattr(torch, "save", full)
        assert run("pretrain", stf_folder, "out", "--save_steps", "2") == 1
        assert re.search(r"No space left on device; \S+checkpoint-2 is whole", capsys.readouterr().err)


def test_two_processes_have_the_losses_of_one(run, tmp_path, stock_folder, data):
    options = ["--learning_rate", "1e-2", "--seed", "3"]
    assert run("finetune", stock_folder, "one", *options, steps=4) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", train.NAME, "finetune"]
    paths = ["--model", str(stock_folder), "--data", str(data), "--output", str(tmp_path / "two")]
    result = python(*torchrun, *paths, *QUIET, "--max_steps", "4", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)


def test_adapters_train_merge_and_reload(run, tmp_path, stf_folder):
    """OUT is the merged model, OUT/adapter what PEFT loads onto the one before."""
    peft = pytest.importorskip("peft")
    assert run("finetune", stf_folder, "out", "--lora", "2", "--learning_rate", "3e-2", steps=10) == 0
    found = losses(tmp_path / "out")
    assert found[-1] < 0.9 * found[0], found
    merged = build.load(tmp_path / "out").eval()
    loaded = peft.PeftModel.from_pretrained(build.load(stf_folder), tmp_path / "out" / "adapter").eval()
    ids, _ = build.prompt([1])
    one, other = (build.run(model, ids, build.pixels(1, torch.float32)).logits for model in (merged, loaded))
    assert torch.allclose(one, other, atol=1e-4)
    assert any("language_model" in name for name in changed(state(stf_folder), merged.state_dict()))


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_models_of_tiles(run, tmp_path, family):
    """Images of several sizes, two of them in one record: lengths are true before an image is decoded."""
    stock = tiled.MODELS[family](torch.float32)
    model, processor = li.from_llava(stock), tiled.processor(stock)
    processor = family_of(model.config).processor.from_llava(processor, merge_size=model.config.spatial_merge_size)
    processor.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "stf")
    processor.save_pretrained(tmp_path / "stf")
    two = {"image": ["0.png", "1.png"], "conversations": [ASKED | {"value": "<image> <image>"}, ANSWERED]}
    data = write_data(tmp_path / "data", [*map(record, range(5)), record(5) | two])
    for index, (height, width) in enumerate(tiled.SIZES[:5]):
        build.image(index, (width, height)).save(tmp_path / "data" / f"{index}.png")
    options = {"max_length": 512, "image_tokens": train_data.tile_tokens(model)}
    records = train_data.Conversations(data, data.parent, processor, **options)
    batch = train_data.Collator(processor, build.IMAGE_TOKEN, 0)([records[index] for index in range(6)])
    assert batch["attention_mask"].sum(1).tolist() == records.lengths
    assert len(set(records.lengths)) > 3
    assert run("pretrain", tmp_path / "stf", "out", "--learning_rate", "1e-2", data=data, steps=8) == 0
    found = losses(tmp_path / "out")
    assert found[-1] < 0.95 * found[0], found
    assert all(".multi_modal_projector." in name for name in changed(model.state_dict(), state(tmp_path / "out")))
    with pytest.raises(BadInput, match=r"--cache-features: expected LLaVA-1\.5 or LLaVA-STF"):
        run("pretrain", tmp_path / "stf", "other", "--cache-features", str(tmp_path / "c"), data=data)


class TestCache:
    def test_the_losses_are_the_same_and_the_tower_rests(self, run, tmp_path, stock_folder, monkeypatch, capsys):
        options = ["--learning_rate", "1e-2"]
        assert run("pretrain", stock_folder, "plain", *options) == 0
        cache = ["--cache-features", str(tmp_path / "cache")]
        assert run("pretrain", stock_folder, "first", *options, *cache) == 0
        assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
        said = capsys.readouterr().err
        assert "8 images need 0.00 GiB in" in said
        assert re.search(r"a step of one record: [\d.]+ s with the tower, [\d.]+ s from the cache, [\d.]+x", said)
        monkeypatch.setattr(FeatureCache, "encode", None)  # nothing is encoded again
        monkeypatch.setattr(train, "saving", lambda *_: None)
        assert run("pretrain", stock_folder, "second", *options, *cache) == 0
        assert losses(tmp_path / "second") == losses(tmp_path / "first")

    @pytest.mark.parametrize(("kind", "per_image"), [("stock_folder", 16), ("stf_folder", 4)])
    def test_blocks_in_place_of_pixels_give_the_same(self, tmp_path, kind, per_image, request):
        folder = request.getfixturevalue(kind)
        model, (ids, mask), pixels = build.load(folder), build.prompt([2, 1], per_image), build.pixels(3, torch.float32)
        blocks = torch.stack(FeatureCache(tmp_path, model, AutoProcessor.from_pretrained(folder)).encode(pixels))
        expected = build.run(model, ids, pixels, mask).logits
        accept_blocks(model)
        with torch.no_grad():
            found = model(input_ids=ids, image_blocks=blocks, attention_mask=mask).logits
        assert torch.allclose(found, expected, atol=1e-5)

    def test_it_is_of_one_tower_and_processor(self, tmp_path, stf_folder):
        model, processor = build.load(stf_folder), AutoProcessor.from_pretrained(stf_folder)
        FeatureCache(tmp_path, model, processor)
        model.config.vision_feature_layer = [3]
        assert FeatureCache(tmp_path, model, processor).layers == [3]
        model.config.vision_feature_layer = [2]
        with pytest.raises(BadInput, match="another choice of layers"):
            FeatureCache(tmp_path, model, processor)
        model.config.vision_feature_layer = [3]
        build.randomize(model.model.vision_tower)
        processor.image_processor.do_normalize = False
        with pytest.raises(BadInput, match="another tower and another processor"):
            FeatureCache(tmp_path, model, processor)

    def test_a_small_disk_and_a_broken_file_are_named(self, tmp_path, stf_folder, monkeypatch):
        model, processor = build.load(stf_folder), AutoProcessor.from_pretrained(stf_folder)
        cache, image = FeatureCache(tmp_path / "cache", model, processor), tmp_path / "a.png"
        build.image().save(image)
        cache.fill([image])
        cache.path(image).write_bytes(b"cut short")
        with pytest.raises(BadInput, match=r"of \S+a\.png, cannot be read"):
            cache[image]
        cache.path(image).unlink()
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 2**28 + 100}))
        with pytest.raises(BadInput, match=r"1 images need .* are free"):
            cache.fill([image])


def test_the_memory_that_is_known_is_exact(run, stf_folder, capsys):
    """Weights, gradients and both moments of AdamW of a projector; activations are an estimate."""
    model = build.load(stf_folder)
    train.choose_parameters(model, "pretrain")
    args = train.parser().parse_args(["pretrain", "--model=m", "--data=d", "--output=o"])
    arguments = train.training_arguments(args, ["--use_cpu"])
    said = train.memory(model, arguments, [10])
    trained = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert f"gradients {4 * trained / 2**30:.2f}, optimizer {8 * trained / 2**30:.2f}" in said


BAD = {
    r"image: \S+none\.png does not exist": {"image": "none.png"},
    "conversations: expected a text from 'gpt' in turn 1": {"conversations": [ASKED] * 2},
    "conversations: .* none of them alone": {"conversations": [ASKED]},
    "conversations: expected 2 <image>, one for each image, got 1": {"image": ["1.png", "0.png"]},
    "image: expected one": {"image": None, "conversations": record(1, 2)["conversations"][2:]},
    "conversations: expected answers with text": {"conversations": [ASKED, {"from": "gpt", "value": " "}]},
    r"conversations: expected at most 512 tokens, got \d+": record(1, 100),
}


class TestBadInput:
    @pytest.mark.parametrize("message", BAD)
    def test_a_record_is_named_by_its_line(self, run, tmp_path, stf_folder, capsys, message):
        data = write_data(tmp_path / "data", [record(0), record(1) | BAD[message], *map(record, (2, 3, 4))])
        with pytest.raises(BadInput, match=f"line 3: {message}"):
            run("pretrain", stf_folder, data=data)
        assert run("pretrain", stf_folder, "skipped", "--skip-bad-records", data=data, steps=1) == 0
        assert "1 bad record(s) left out" in capsys.readouterr().err

    @pytest.mark.parametrize("cached", [False, True])
    def test_an_image_that_does_not_decode(self, run, tmp_path, stf_folder, cached):
        data = write_data(tmp_path / "data", [record(index) for index in range(4)])
        (tmp_path / "data" / "2.png").write_bytes((tmp_path / "data" / "2.png").read_bytes()[:200])
        options = ["--cache-features", str(tmp_path / "cache")] * cached
        with pytest.raises(BadInput, match=r"line 4: image: \S+2\.png does not decode"):
            run("pretrain", stf_folder, "out", *options, data=data)
        assert run("pretrain", stf_folder, "skipped", *options, "--skip-bad-records", data=data, steps=1) == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--batch", "3"], "--batch: expected a multiple of 2"),
            (["--model", "/nowhere"], "--model: /nowhere cannot be loaded"),
            (["--data", "/nowhere"], "/nowhere: cannot be read"),
            (["--data", "HERE/cut.json"], "line 2: no JSON"),
        ],
    )
    def test_options(self, run, stf_folder, tmp_path, options, message):
        (tmp_path / "cut.json").write_text('[{}, \n{"image": ')
        options = [word.replace("HERE", str(tmp_path)) for word in options]
        with pytest.raises(BadInput, match=message):
            run("pretrain", stf_folder, "out", *options)
