"""Broken if this fails: weights that are cut short, damaged or hostile are converted, executed or end in a riddle."""

import contextlib
import os
import pickle
import random

import pytest
import torch

from llava_integration.convert import ConversionError
from llava_integration.convert.checkpoint import open_weights
from tests.convert import checkpoints as ck


class TestTruncated:
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_bin(self, refused, src, dst, share):
        file = src / "pytorch_model-00002-of-00002.bin"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        refused(r"pytorch_model-00002-of-00002\.bin: truncated.*get the file again", src, dst)

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
    def test_safetensors(self, refused, tmp_path, dst, share):
        src = ck.make_official(tmp_path, 2, "safetensors")
        file = src / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        refused(r"model-00002-of-00002\.safetensors: truncated.*get the file again", src, dst)

    def test_a_shard_is_missing(self, refused, src, dst):
        (src / "pytorch_model-00001-of-00002.bin").unlink()
        refused(r"index\.json: names pytorch_model-00001-of-00002\.bin, which is not in the folder", src, dst)

    def test_a_shard_lacks_what_the_index_names(self, refused, src, dst):
        torch.save({}, src / "pytorch_model-00001-of-00002.bin")
        refused(r"index\.json: names \d+ tensors that its files do not hold", src, dst)

    def test_index_is_no_json(self, refused, src, dst):
        (src / "pytorch_model.bin.index.json").write_text('{"weight_map": {')
        refused(r"index\.json: expected JSON", src, dst)

    def test_an_index_reaches_no_other_folder(self, refused, src, dst):
        ck.write_json(src / "pytorch_model.bin.index.json", {"weight_map": {"x": "../official/secret.bin"}})
        refused(r"names \.\./official/secret\.bin, which is not in the folder", src, dst)

    def test_git_lfs_pointer(self, refused, src, dst):
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
    def test_a_tensor_is_missing(self, refused, src, dst, name):
        ck.rewrite(src, lambda tensors: tensors.pop(name))
        refused(r"^SRC: 1 tensors are missing: model\..*complete the checkpoint", src, dst)

    def test_half_of_the_projector(self, refused, src, dst):
        ck.rewrite(src, lambda tensors: tensors.pop("model.mm_projector_crosslayer.2.weight"))
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


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["torch.save", "plain pickle", "safetensors name"])
def test_a_pickle_with_code_in_it_is_not_executed(refused, src, dst, tmp_path, kind):
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


def test_a_bin_of_other_objects(refused, src, dst):
    torch.save({"state_dict": {"x": torch.ones(1)}, "epoch": 3}, src / "pytorch_model-00001-of-00002.bin")
    refused(r"expected a dict of tensors, got a dict with dict, int", src, dst)
