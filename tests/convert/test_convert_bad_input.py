"""Broken if this fails: a bad checkpoint, option or disk leaves half a folder, a changed SRC or a riddle.

Every case: ConversionError of one line that names what is wrong, nothing at DST, no temporary folder, SRC as it was.
"""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import signal

import pytest
import torch
from transformers.utils import logging

from llava_integration.convert import ConversionError, convert_official, writer
from llava_integration.convert.__main__ import main
from llava_integration.convert.checkpoint import open_weights
from tests.convert import checkpoints as ck


def refused(match, src, dst, **options):
    before = ck.snapshot(src) if src.is_dir() else {}
    beside = set(dst.parent.iterdir())
    with pytest.raises(ConversionError, match=match) as caught:
        convert_official(src, dst, **options)
    assert "\n" not in str(caught.value)
    assert set(dst.parent.iterdir()) == beside, "nothing at DST, nothing beside it"
    assert not src.is_dir() or ck.snapshot(src) == before


@pytest.fixture
def src(official, tmp_path):
    for folder in ("official", "tower"):
        shutil.copytree(official.parent / folder, tmp_path / folder)
    return tmp_path / "official"


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "stf"


def rewrite(src, change):
    """`src` with its tensors changed by `change`, in one file."""
    tensors = ck.whole_tensors()
    change(tensors)
    (src / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    ck.write_bin(src, tensors)


class TestTruncated:
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_bin(self, src, dst, share):
        file = src / "pytorch_model-00002-of-00002.bin"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        refused(r"pytorch_model-00002-of-00002\.bin: truncated.*get the file again", src, dst)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_safetensors(self, tmp_path, dst, share):
        src = ck.make_official(tmp_path, 2, "safetensors")
        file = src / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        refused(r"model-00002-of-00002\.safetensors: truncated.*get the file again", src, dst)

    def test_a_shard_is_missing(self, src, dst):
        (src / "pytorch_model-00001-of-00002.bin").unlink()
        refused(r"index\.json: names pytorch_model-00001-of-00002\.bin, which is not in the folder", src, dst)

    def test_a_shard_lacks_what_the_index_names(self, src, dst):
        torch.save({}, src / "pytorch_model-00001-of-00002.bin")
        refused(r"index\.json: names \d+ tensors that its files do not hold", src, dst)

    def test_index_is_no_json(self, src, dst):
        (src / "pytorch_model.bin.index.json").write_text('{"weight_map": {')
        refused(r"index\.json: expected JSON", src, dst)

    def test_an_index_reaches_no_other_folder(self, src, dst):
        ck.write_json(src / "pytorch_model.bin.index.json", {"weight_map": {"x": "../official/secret.bin"}})
        refused(r"names \.\./official/secret\.bin, which is not in the folder", src, dst)

    def test_git_lfs_pointer(self, src, dst):
        (src / "pytorch_model-00001-of-00002.bin").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
        refused(r"got a git-lfs pointer; run git lfs pull", src, dst)

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1.mlp.up_proj.weight",
            "model.mm_projector_crosslayer.2.bias",
            "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        ],
    )
    def test_a_tensor_is_missing(self, src, dst, name):
        rewrite(src, lambda tensors: tensors.pop(name))
        refused(r"^SRC: 1 tensors are missing: model\..*complete the checkpoint", src, dst)

    def test_half_of_the_projector(self, src, dst):
        rewrite(src, lambda tensors: tensors.pop("model.mm_projector_crosslayer.2.weight"))
        refused(r"expected both of mm_projector_crosslayer", src, dst)


def test_damaged_bits(src, dst):
    """Some bytes of a pickle changed: never anything but a ConversionError, or weights that are other weights."""
    (src / "pytorch_model.bin.index.json").unlink()
    ck.write_bin(src, ck.whole_tensors())
    file = src / "pytorch_model.bin"
    whole, generator = file.read_bytes(), random.Random(1)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.randrange(4000)] = generator.randrange(256)
        file.write_bytes(damaged)
        with contextlib.suppress(ConversionError):
            open_weights(src)
    assert not dst.exists()


class TestForeign:
    def test_an_unknown_tensor(self, src, dst):
        rewrite(src, lambda tensors: tensors.update({"model.image_newline": torch.ones(ck.D)}))
        refused(r"^SRC: 1 tensors are left over: model\.image_newline", src, dst)

    def test_a_third_linear_in_the_projector(self, src, dst):
        rewrite(src, lambda tensors: tensors.update({"model.mm_projector.4.weight": torch.ones(ck.D, ck.D)}))
        refused(r"left over: model\.mm_projector\.4\.weight", src, dst)

    def test_a_language_model_alone(self, src, dst):
        (src / "pytorch_model.bin.index.json").unlink()
        ck.write_bin(src, ck.official_tensors(None, ck.make_language(), {}))
        refused(r"expected an official LLaVA-STF checkpoint with mm_projector.*got tensors such as", src, dst)

    def test_llava_without_stf(self, src, dst):
        def change(tensors):
            for name in [name for name in tensors if "crosslayer" in name]:
                tensors.pop(name)
            tensors["model.mm_projector.0.weight"] = torch.randn(ck.D, ck.C)

        rewrite(src, change)
        refused(r"so this is LLaVA-1\.5, not LLaVA-STF", src, dst)

    def test_a_folder_of_transformers(self, stock, dst):
        refused(r"config\.json|mm_vision_tower", stock[0], dst)

    def test_a_shape(self, src, dst):
        rewrite(src, lambda tensors: tensors.update({"model.norm.weight": torch.ones(ck.D + 1)}))
        refused(r"model\.norm\.weight in pytorch_model\.bin: expected shape \[48\].*got \[49\]", src, dst)

    @pytest.mark.parametrize(("value", "got"), [(torch.tensor(1.0), r"shape \[\]"), (None, "none")], ids=str)
    def test_embeddings(self, src, dst, value, got):
        name = "model.embed_tokens.weight"
        rewrite(src, lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value}))
        refused(rf"^SRC: model\.embed_tokens\.weight: expected a matrix .*, got {got}", src, dst)

    def test_quantized_weights(self, src, dst):
        name = "model.layers.0.mlp.up_proj.weight"
        rewrite(src, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
        refused(r"up_proj\.weight in pytorch_model\.bin: expected float32, float16 or bfloat16", src, dst)

    def test_no_weights(self, src, dst):
        (src / "pytorch_model.bin.index.json").unlink()
        refused(r"^SRC: expected one of model\.safetensors\.index\.json", src, dst)

    def test_no_config(self, src, dst):
        (src / "config.json").unlink()
        refused(r"^SRC: expected config\.json", src, dst)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"mm_projector_type": "linear"}, "mm_projector_type: expected 'mlp2x_gelu', got 'linear'"),
            ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: expected 'pad' or 'square'"),
            ({"mm_hidden_size": 64}, "mm_hidden_size: expected 32"),
            ({"model_type": "llava_mpt"}, "expected model_type llava_llama, got 'llava_mpt'"),
            ({"mm_vision_tower": None}, "mm_vision_tower: expected a name, got None.*--vision-tower DIR"),
            ({"mm_vision_tower": "google/siglip"}, "neither a local folder nor one of.*--vision-tower DIR"),
            ({"num_hidden_layers": 3}, r"9 tensors are missing"),
            ({"num_hidden_layers": 1}, r"9 tensors are left over"),
            ({"mm_vision_select_layer": [99] * 8}, r"^SRC: config\.json: mm_vision_select_layer: .*got 99"),
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end: expected False, got True"),
            ({"num_hidden_layers": "two"}, "^SRC: config.json: .*num_hidden_layers.*'two'.*get the file again"),
            ({"num_attention_heads": 5}, r"^SRC: config\.json: .*attention heads \(5\)"),
            ({"num_attention_heads": 0}, r"^SRC: config\.json: "),
            ({"rope_scaling": [1]}, r"^SRC: config\.json: "),
            ({"rope_scaling": {"type": "nonsense"}}, r"^SRC: config\.json: .*nonsense"),
            ({"rope_theta": "big"}, r"^SRC: config\.json: "),
            ({"hidden_act": "nonsense"}, r"^SRC: config\.json: .*nonsense"),
            ({"bos_token_id": "a"}, r"^SRC: config\.json: .*bos_token_id"),
            ({"model_type": ["llava_llama"]}, "expected model_type llava_llama, got"),
            ({"mm_vision_tower": 5}, r"^SRC: config\.json: mm_vision_tower: expected a name, got 5"),
            ({"mm_vision_select_layer": -3}, r"^--blocks: the checkpoint does not name its 8 blocks"),
        ],
    )
    def test_configuration(self, src, dst, changes, match):
        ck.write_json(src / "config.json", ck.official_config(**changes))
        refused(match, src, dst)

    @pytest.mark.parametrize(
        "vision",
        [[1], ck.VISION | {"hidden_size": "a"}, ck.VISION | {"patch_size": 0}, ck.VISION | {"patch_size": 100},
         ck.VISION | {"num_attention_heads": 7}],
        ids=lambda value: "list" if isinstance(value, list) else next(k for k in value if value[k] != ck.VISION[k]),
    )  # fmt: skip
    def test_configuration_of_the_tower(self, src, dst, vision):
        ck.write_json(src.parent / "tower" / "config.json", {"model_type": "clip", "vision_config": vision})
        refused(r"tower/config\.json: expected valid values, got .*get the file again", src, dst)

    @pytest.mark.parametrize("blocks", [3, [], ["a"] * 8, [99, *ck.BLOCKS[1:]], ck.BLOCKS[:3]], ids=str)
    def test_blocks(self, src, dst, blocks):
        refused(r"^--blocks: expected ", src, dst, blocks=blocks)

    @pytest.mark.parametrize("size", [0, -5, 2.5e9])
    def test_size_of_a_shard(self, src, dst, size):
        refused(r"^max_shard_bytes: expected a positive int or None, got", src, dst, max_shard_bytes=size)

    @pytest.mark.parametrize(
        "settings",
        [{"size": "big"}, {"size": {"height": 1}}, {"image_mean": [1]}, {"resample": 99}, {"rescale_factor": "x"}],
        ids=str,
    )
    def test_settings_of_images(self, src, dst, settings):
        ck.write_json(src / "preprocessor_config.json", settings)
        refused(r"^preprocessor_config\.json: expected valid values, got .*correct the file or remove it", src, dst)

    def test_the_towers_weights_are_nowhere(self, src, dst):
        rewrite(src, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])
        refused(r"expected the weights of the vision tower tower in it, found none.*--vision-tower DIR", src, dst)

    def test_images_of_another_size(self, src, dst):
        ck.write_json(src / "preprocessor_config.json", {"size": 28, "crop_size": 28})
        refused(r"preprocessor_config\.json: expected images of 56x56.*got 28x28", src, dst)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["torch.save", "plain pickle", "safetensors name"])
def test_a_pickle_with_code_in_it_is_not_executed(src, dst, tmp_path, kind):
    mark, file = tmp_path / "executed", src / "pytorch_model-00001-of-00002.bin"
    content = {"model.norm.weight": Bomb(mark)}
    if kind == "torch.save":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    if kind == "safetensors name":
        file.rename(src / "model.safetensors")
    match = "truncated or not safetensors" if kind == "safetensors name" else "code in it, which was not executed"
    refused(match, src, dst)
    assert not mark.exists()


def test_a_bin_of_other_objects(src, dst):
    torch.save({"state_dict": {"x": torch.ones(1)}, "epoch": 3}, src / "pytorch_model-00001-of-00002.bin")
    refused(r"expected a dict of tensors, got a dict with dict, int", src, dst)


class TestTokenizer:
    def test_without_room_for_the_image_token(self, src, dst):
        ck.make_tokenizer([*ck.SPECIAL, *(f"w{i}" for i in range(ck.ROWS))]).save_pretrained(src)
        refused(r"^tokenizer: expected ids below 40.*got 42; there is no room for <image>", src, dst)

    def test_that_is_none(self, src, dst):
        (src / "tokenizer.json").write_text("{}")
        refused(r"tokenizer\.json: expected a tokenizer", src, dst)

    def test_settings_of_another_type(self, src, dst):
        settings = json.loads((src / "tokenizer_config.json").read_text())
        ck.write_json(src / "tokenizer_config.json", settings | {"model_max_length": []})
        refused(r"tokenizer\.json: expected a tokenizer", src, dst)

    def test_model_file_that_is_none(self, src, dst):
        (src / "tokenizer.json").unlink()
        (src / "tokenizer.model").write_bytes(b"\xff" * 50)
        refused(r"tokenizer\.model: expected a byte-pair model of sentencepiece", src, dst)


class TestLora:
    @pytest.fixture
    def lora(self, tmp_path, src):
        folder = tmp_path / "lora"
        folder.mkdir()
        ck.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "lora_alpha": 2})
        ck.write_json(folder / "config.json", ck.official_config())
        self.write(folder, "model.layers.0.self_attn.q_proj")
        return folder

    def write(self, folder, module, sides="AB", columns=ck.D, **more):
        shapes = {"A": (2, columns), "B": (ck.D, 2)}
        factors = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(shapes[side]) for side in sides}
        torch.save(factors | more, folder / "adapter_model.bin")

    def test_without_base(self, lora, dst):
        refused(r"^--base: SRC is a LoRA adapter.*name the folder", lora, dst)

    def test_base_that_does_not_fit(self, lora, src, dst):
        self.write(lora, "model.layers.9.self_attn.q_proj")
        refused(r"adapts model\.layers\.9\.self_attn\.q_proj, which the base does not have", lora, dst, base=src)
        self.write(lora, "model.layers.0.self_attn.q_proj", columns=7)
        refused(r"do not fit the base's \[48, 48\]", lora, dst, base=src)

    def test_one_factor(self, lora, src, dst):
        self.write(lora, "model.layers.0.self_attn.q_proj", "B")
        refused(r"expected lora_A and lora_B.*got lora_B only", lora, dst, base=src)

    def test_other_adapters(self, lora, src, dst):
        self.write(
            lora, "model.layers.0.self_attn.q_proj", **{"base_model.model.x.lora_magnitude_vector": torch.ones(1)}
        )
        refused(r"lora_magnitude_vector is neither", lora, dst, base=src)
        ck.write_json(lora / "adapter_config.json", {"peft_type": "LORA", "use_dora": True})
        refused(r"expected plain LoRA, got use_dora", lora, dst, base=src)
        ck.write_json(lora / "adapter_config.json", {"peft_type": "IA3"})
        refused(r"expected plain LoRA, got peft_type 'IA3'", lora, dst, base=src)

    @pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
    def test_factors_that_hold_a_part_of_the_base(self, lora, src, dst, start):
        ck.write_json(lora / "adapter_config.json", {"peft_type": "LORA", "init_lora_weights": start})
        self.write(lora, "model.layers.0.self_attn.q_proj")
        refused(
            rf"expected plain LoRA, got init_lora_weights '{start}'.* merge the adapter with PEFT", lora, dst, base=src
        )

    @pytest.mark.parametrize(
        "changes", [{"lora_alpha": "x"}, {"alpha_pattern": {"(": 2}}, {"alpha_pattern": [1]}], ids=str
    )
    def test_settings_of_another_type(self, lora, src, dst, changes):
        ck.write_json(lora / "adapter_config.json", {"peft_type": "LORA"} | changes)
        refused(r"^SRC: adapter_config\.json: expected valid values", lora, dst, base=src)

    def test_no_weights(self, lora, src, dst):
        (lora / "adapter_model.bin").unlink()
        refused(r"expected adapter_model\.safetensors or adapter_model\.bin", lora, dst, base=src)


class TestPretrain:
    def test_without_base(self, tmp_path, dst):
        src = tmp_path / "pretrain"
        src.mkdir()
        torch.save(ck.make_projector(), src / "mm_projector.bin")
        refused(r"^--base: SRC is mm_projector\.bin alone", src, dst)

    def test_foreign_tensors(self, tmp_path, src, dst):
        pretrain = tmp_path / "pretrain"
        pretrain.mkdir()
        torch.save(ck.make_projector() | {"model.embed_tokens.weight": torch.ones(1)}, pretrain / "mm_projector.bin")
        refused(r"expected the tensors of mm_projector.*got model\.embed_tokens", pretrain, dst, base=src)

    def test_base_with_a_whole_checkpoint(self, src, dst):
        refused(r"^--base: SRC is a whole checkpoint", src, dst, base=src)


class TestDestination:
    @pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "dangling link"])
    def test_exists(self, src, dst, kind):
        if kind == "file":
            dst.write_text("mine")
        elif kind == "dangling link":
            dst.symlink_to("nowhere")
        else:
            dst.mkdir()
            if kind == "folder":
                (dst / "mine").write_text("mine")
        refused(r"^DST: expected a path where nothing is, got .*which exists", src, dst)
        if kind in ("file", "folder"):
            assert (dst if kind == "file" else dst / "mine").read_text() == "mine"

    def test_appears_meanwhile(self, src, dst, monkeypatch):
        def write(file, data):
            dst.mkdir(exist_ok=True)
            (dst / "mine").write_text("mine")
            file.write(data)

        monkeypatch.setattr(writer, "write", write)
        with pytest.raises(ConversionError, match="which exists"):
            convert_official(src, dst)
        assert ck.snapshot(dst) == {"mine": b"mine"}

    def test_in_the_source(self, src):
        refused(r"^DST: expected a place outside", src, src / "stf")

    def test_parent_is_missing(self, src, tmp_path):
        with pytest.raises(ConversionError, match=r"^DST: expected its parent to be a folder"):
            convert_official(src, tmp_path / "no" / "stf")

    def test_source_is_missing(self, dst, tmp_path):
        refused(r"^SRC: expected a local folder, got .*nowhere", tmp_path / "nowhere", dst)


class TestDisk:
    @pytest.mark.parametrize("after", [0, 30, 400])
    def test_full_half_way(self, src, dst, monkeypatch, after):
        written = []

        def write(file, data):
            if len(written) == after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(file.write(data))

        monkeypatch.setattr(writer, "write", write)
        refused(r"^DST: could not write .*: No space left on device; nothing is left there", src, dst)
        assert len(written) == after

    def test_too_small_from_the_start(self, src, dst, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        refused(r"^DST: expected 0\.0\d GB free", src, dst)

    def test_full_at_the_small_files(self, src, dst, monkeypatch):
        def fail(*_args, **_options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("llava_integration.convert.folder.model_card", fail)
        refused(r"No space left", src, dst)


def test_values_that_float16_cannot_hold(src, dst):
    rewrite(src, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    refused(r"^--dtype: model\.language_model\.norm\.weight has values up to 1e\+05", src, dst, dtype=torch.float16)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def restore(self):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        verbosity = logging.get_verbosity()
        yield
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.set_verbosity(verbosity)

    def test_report(self, src, dst, capsys):
        assert main(["official", str(src), str(dst), "--dtype", "bfloat16"]) == 0
        out = capsys.readouterr().out
        assert "relaid out: 1" in out
        assert "GB, bfloat16" in out
        assert json.loads((dst / "config.json").read_text())["dtype"] == "bfloat16"

    def test_one_line_and_exit_code_2(self, src, dst, capsys):
        dst.mkdir()
        assert main(["official", str(src), str(dst)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("convert: DST: expected a path where nothing is")
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments", [[], ["official"], ["llava", "a", "b", "--blocks", "x"], ["official", "a", "b", "--dtype", "int8"]]
    )
    def test_usage(self, arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2

    @pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
    def test_stopped_half_way(self, src, dst, monkeypatch, sent, code):
        """The folder beside DST goes then too."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        beside = set(dst.parent.iterdir())

        def write(file, data):
            file.write(data)
            assert set(dst.parent.iterdir()) != beside
            os.kill(os.getpid(), sent)

        monkeypatch.setattr(writer, "write", write)
        try:
            got = main(["official", str(src), str(dst)])
        except SystemExit as error:
            got = error.code
        assert got == code
        assert set(dst.parent.iterdir()) == beside

    def test_a_closed_terminal_does_not_stop_what_nohup_started(self, src, dst):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert main(["official", str(src), str(dst)]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
