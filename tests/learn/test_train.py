"""If this fails, `python -m llava_integration.train` does not train what its recipes say, or loses a run."""

import json
import re
import sys

import pytest
import torch
from support.processes import python
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_integration as li
from llava_integration import train, train_data
from llava_integration.train_cache import CacheError, FeatureCache
from tests.learn.conftest import record, write_data
from tests.llava import build

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
        moved = changed(before, state(tmp_path / "out"))
        assert moved == {name for name in before if ".multi_modal_projector." in name}

    def test_finetuning_moves_the_language_model_too(self, run, tmp_path, stf_folder):
        assert run("finetune", stf_folder, "out", "--learning_rate", "1e-2") == 0
        moved = changed(state(stf_folder), state(tmp_path / "out"))
        assert {name.split(".")[1] for name in moved} == {"multi_modal_projector", "language_model", "weight"}

    @pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
    def test_rates_and_batches_are_the_papers(self, recipe, tmp_path):
        args = train.parser().parse_args([recipe, "--model", "m", "--data", "d", "--output", str(tmp_path)])
        found = train.training_arguments(args, ["--use_cpu", "--per_device_train_batch_size", "4"])
        rate, batch = {"pretrain": (1e-3, 256), "finetune": (2e-5, 128)}[recipe]
        assert (found.learning_rate, 4 * found.gradient_accumulation_steps) == (rate, batch)
        assert (found.lr_scheduler_type, found.warmup_steps, found.weight_decay) == ("cosine", 0.03, 0)

    def test_what_was_trained_answers(self, run, tmp_path, stock_folder):
        """Folder and processor load with nothing but the Auto classes."""
        assert run("pretrain", stock_folder, steps=1) == 0
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        inputs = processor(images=build.image(), text="USER <image> what is in ASSISTANT", return_tensors="pt")
        assert (inputs.input_ids == build.IMAGE_TOKEN).sum() == 4
        assert build.load(tmp_path / "out").generate(**inputs, max_new_tokens=2).shape[0] == 1


class TestResuming:
    @pytest.mark.parametrize("stock", [False, True])
    def test_an_interrupted_run_ends_as_the_uninterrupted(self, run, tmp_path, stock_folder, monkeypatch, stock):
        """Of the half-written newest checkpoint nothing is used."""
        options = ["--learning_rate", "1e-2", "--save_steps", "2", *["--stock"] * stock]
        assert run("finetune", stock_folder, "whole", *options) == 0
        collate, calls = train_data.Collator.__call__, []

        def interrupted(self, items):
            calls.append(items)
            if len(calls) > 9:
                raise KeyboardInterrupt
            return collate(self, items)

        monkeypatch.setattr(train_data.Collator, "__call__", interrupted)
        assert run("finetune", stock_folder, "parts", *options) == 130
        monkeypatch.undo()
        assert len(losses(tmp_path / "parts")) == 4
        (tmp_path / "parts" / "checkpoint-5").mkdir()
        assert run("finetune", stock_folder, "parts", *options, "--resume") == 0
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
        assert not changed(state(tmp_path / "whole"), state(tmp_path / "parts"))

    def test_the_folder_of_another_run_is_refused(self, run, stf_folder, capsys):
        assert run("pretrain", stf_folder, "out", steps=1) == 0
        assert run("pretrain", stf_folder, "out", steps=1) == 2
        assert "go on with --resume" in capsys.readouterr().err
        assert run("pretrain", stf_folder, "out", "--learning_rate", "0.5", "--resume", steps=1) == 2
        assert "learning_rate 0.001, now 0.5" in capsys.readouterr().err

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


class TestCache:
    @pytest.mark.parametrize("stock", [False, True])
    def test_the_losses_are_the_same_and_the_tower_rests(self, run, tmp_path, stock_folder, monkeypatch, stock, capsys):
        options = ["--learning_rate", "1e-2", *["--stock"] * stock]
        assert run("pretrain", stock_folder, "plain", *options) == 0
        cache = ["--cache-features", str(tmp_path / "cache")]
        assert run("pretrain", stock_folder, "first", *options, *cache) == 0
        assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
        said = capsys.readouterr().err
        assert "features of 8 images" in said
        assert re.search(r"a step of one record: [\d.]+ s with the tower, [\d.]+ s from the cache, [\d.]+x", said)
        monkeypatch.setattr(FeatureCache, "encode", None)  # nothing is encoded again
        monkeypatch.setattr(train, "saving", lambda *_: None)
        assert run("pretrain", stock_folder, "second", *options, *cache) == 0
        assert losses(tmp_path / "second") == losses(tmp_path / "first")

    def test_it_is_of_one_tower_and_processor(self, tmp_path, stf_folder):
        model, processor = build.load(stf_folder), AutoProcessor.from_pretrained(stf_folder)
        FeatureCache(tmp_path, model, processor)
        model.config.vision_feature_layer = [3]
        assert FeatureCache(tmp_path, model, processor).layers == [3]
        model.config.vision_feature_layer = [2]
        with pytest.raises(CacheError, match="another choice of layers"):
            FeatureCache(tmp_path, model, processor)
        model.config.vision_feature_layer = [3]
        build.randomize(model.model.vision_tower)
        processor.image_processor.do_normalize = False
        with pytest.raises(CacheError, match="another tower and another processor"):
            FeatureCache(tmp_path, model, processor)

    def test_a_small_disk_and_a_broken_file_are_named(self, tmp_path, stf_folder, monkeypatch):
        model, processor = build.load(stf_folder), AutoProcessor.from_pretrained(stf_folder)
        cache, image = FeatureCache(tmp_path / "cache", model, processor), tmp_path / "a.png"
        build.image().save(image)
        cache.fill([image])
        cache.path(image).write_bytes(b"cut short")
        with pytest.raises(CacheError, match=r"of \S+a\.png, cannot be read"):
            cache[image]
        cache.path(image).unlink()
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 2**28 + 100}))
        with pytest.raises(CacheError, match=r"1 images need .* are free"):
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
    assert "too much" not in said
    assert "too much" in train.memory(model, arguments, [10**12])


ASKED = {"from": "human", "value": "<image>"}
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
        assert run("pretrain", stf_folder, data=data) == 2
        assert re.search(f"line 3: {message}", capsys.readouterr().err)
        assert run("pretrain", stf_folder, "skipped", "--skip-bad-records", data=data, steps=1) == 0
        assert "1 bad record(s) left out" in capsys.readouterr().err

    @pytest.mark.parametrize("cached", [False, True])
    def test_an_image_that_does_not_decode(self, run, tmp_path, stf_folder, capsys, cached):
        data = write_data(tmp_path / "data", [record(index) for index in range(4)])
        (tmp_path / "data" / "2.png").write_bytes((tmp_path / "data" / "2.png").read_bytes()[:200])
        options = ["--cache-features", str(tmp_path / "cache")] * cached
        assert run("pretrain", stf_folder, "out", *options, data=data) == 2
        assert re.search(r"line 4: image: \S+2\.png does not decode", capsys.readouterr().err)
        assert run("pretrain", stf_folder, "skipped", *options, "--skip-bad-records", data=data, steps=1) == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--batch", "3"], "--batch: expected a multiple of 2"),
            (["--blocks", "5", "3"], "--blocks, --merge-size: .* is no LLaVA-1.5"),
            (["--model", "/nowhere"], "--model: /nowhere cannot be loaded"),
            (["--data", "/nowhere"], "/nowhere: cannot be read"),
        ],
    )
    def test_options(self, run, stf_folder, capsys, options, message):
        assert run("pretrain", stf_folder, "out", *options) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_a_file_that_is_cut_short(self, run, tmp_path, stf_folder, capsys):
        data = write_data(tmp_path / "data", [record(0), record(1)])
        data.write_text(data.read_text()[:-40])
        assert run("pretrain", stf_folder, data=data) == 2
        assert "line 3: no JSON" in capsys.readouterr().err


def test_help_needs_no_torch():
    result = python("-X", "importtime", "-m", train.NAME, "--help")
    assert result.returncode == 0
    assert "--skip-bad-records" in result.stdout
    assert "| torch\n" not in result.stderr.replace(" ", "")
    assert sys.modules["torch"]
