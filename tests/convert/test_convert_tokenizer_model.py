"""Broken if this fails: a tokenizer.model, the only tokenizer file of the official checkpoints, is read as another one.

What it must give is merged by hand.
"""

import sys

import pytest
from PIL import Image
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from transformers import AutoProcessor

from llava_integration.convert import convert_official
from llava_integration.convert.processor import read_sentencepiece
from tests.convert import checkpoints as ck

# The best score comes first; "▁cat" can be made of "▁c" + "at" and of "▁" + "cat".
PIECES = ["ab", "▁c", "at", "cat", "▁cat", "▁a", "▁ab", "▁", "a", "b", "c", "t", "U", ":"]
SETTINGS = {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>"}
SETTINGS |= {"model_max_length": 2048, "pad_token": None, "tokenizer_class": "LlamaTokenizer", "legacy": False}


def write(folder, kind=sentencepiece.TrainerSpec.BPE, pieces=PIECES):
    model = sentencepiece.ModelProto()
    model.trainer_spec.model_type = kind
    types = sentencepiece.ModelProto.SentencePiece
    special = [("<unk>", types.UNKNOWN), ("<s>", types.CONTROL), ("</s>", types.CONTROL), ("<0x0A>", types.BYTE)]
    for text, type_ in special if pieces else []:
        model.pieces.add(piece=text, score=0.0, type=type_)
    for rank, text in enumerate(pieces):
        model.pieces.add(piece=text, score=-float(rank))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    ck.write_json(folder / "tokenizer_config.json", SETTINGS)
    ck.write_json(folder / "special_tokens_map.json", {"unk_token": "<unk>"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", ["▁cat"]),  # ▁+c, a+t, then ▁c+at
        ("ab", ["▁ab"]),  # a+b first; then ▁+ab
        ("b cat", ["▁", "b", "▁cat"]),
        ("a\nb", ["▁a", "<0x0A>", "b"]),
    ],
)
def test_pieces(tmp_path, text, expected):
    write(tmp_path)
    tokenizer = read_sentencepiece(tmp_path)
    assert tokenizer.tokenize(text) == expected
    assert tokenizer(text)["input_ids"] == [1, *tokenizer.convert_tokens_to_ids(expected)]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.model_max_length == 2048


def test_a_converted_folder_has_it(tmp_path, dst):
    """And the text behind an image starts with a word boundary, as where pieces of a prompt are encoded one by one."""
    src = ck.make_official(tmp_path, tokenizer=False)
    write(src)
    convert_official(src, dst)
    processor = AutoProcessor.from_pretrained(dst)
    ids = processor(images=Image.new("RGB", (9, 9)), text="U:<image>\ncat", return_tensors="pt")["input_ids"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["<s>", "▁", "U", ":", *["<image>"] * 4, "▁", "<0x0A>", "cat"]

    processor.save_pretrained(tmp_path / "once")
    AutoProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = AutoProcessor.from_pretrained(tmp_path / "twice")
    assert again.tokenizer("U:<image>\ncat")["input_ids"] == processor.tokenizer("U:<image>\ncat")["input_ids"]
    assert again.tokenizer.model_max_length == 2048


def test_added_tokens_keep_their_ids(refused, tmp_path, dst):
    """A fine-tuned checkpoint may have embeddings behind the pieces; the image token comes behind those."""
    src = ck.make_official(tmp_path, tokenizer=False)
    write(src)
    known = len(read_sentencepiece(src).get_vocab())
    ck.write_json(src / "added_tokens.json", {"<stop>": known + 1, "[PAD]": known})
    convert_official(src, dst)
    processor = AutoProcessor.from_pretrained(dst)
    assert processor.tokenizer.convert_tokens_to_ids(["[PAD]", "<stop>"]) == [known, known + 1]
    assert processor.image_token_id == known + 2
    assert processor.tokenizer.tokenize("ab<stop>") == ["▁ab", "<stop>"]

    ck.write_json(src / "added_tokens.json", {"<other>": known + 5})
    refused(rf"'<other>': expected the next id, {known}, got {known + 5}", src, tmp_path / "again")
    ck.write_json(src / "tokenizer_config.json", SETTINGS | {"added_tokens_decoder": {"x": "<other>"}})
    refused(r"tokenizer_config\.json or added_tokens\.json: expected valid values", src, tmp_path / "again")


def test_files_that_are_no_byte_pair_model(refused, src, dst):
    (src / "tokenizer.json").unlink()
    expected = r"tokenizer\.model: expected a byte-pair model of sentencepiece, got "
    write(src, kind=sentencepiece.TrainerSpec.UNIGRAM)
    refused(expected + "a model of another kind; get the file again", src, dst)
    write(src, pieces=[])
    refused(expected + "no pieces", src, dst)
    (src / "tokenizer.model").write_bytes(b"\xff" * 50)
    refused(expected, src, dst)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf.message"])
def test_a_package_that_is_missing(refused, src, dst, monkeypatch, package):
    (src / "tokenizer.json").unlink()
    write(src)
    monkeypatch.setitem(sys.modules, package, None)
    refused(r"tokenizer\.model: reading it takes .* sentencepiece and protobuf.* pip install .*\[convert\]", src, dst)
