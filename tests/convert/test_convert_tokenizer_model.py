"""Broken if this fails: a tokenizer.model, the only tokenizer file of the official checkpoints, is read as another one.

The file is written here, field by field, and what it must give is merged by hand.
"""

import json
import struct

import pytest
from PIL import Image
from transformers import AutoProcessor

from llava_integration.convert import ConversionError, convert_official
from llava_integration.convert.processor import read_sentencepiece
from tests.convert import checkpoints as ck

# The best score comes first; "▁cat" can be made of "▁c" + "at" and of "▁" + "cat".
PIECES = ["ab", "▁c", "at", "cat", "▁cat", "▁a", "▁ab"]
LETTERS = ["▁", "a", "b", "c", "t", "U", ":"]


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def piece(text, score, kind):
    data = text.encode()
    body = b"\x0a" + varint(len(data)) + data + b"\x15" + struct.pack("<f", score)
    if kind != 1:
        body += b"\x18" + varint(kind)
    return b"\x0a" + varint(len(body)) + body


def model_file(kind=2):
    entries = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6)]
    entries += [(text, -float(i), 1) for i, text in enumerate(PIECES)]
    entries += [(text, -float(len(PIECES) + i), 1) for i, text in enumerate(LETTERS)]
    trainer = b"\x18" + varint(kind) + b"\x20" + varint(300)
    return b"".join(piece(*entry) for entry in entries) + b"\x12" + varint(len(trainer)) + trainer


def write(folder, kind=2):
    (folder / "tokenizer.model").write_bytes(model_file(kind))
    ck.write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": "</s>",
            "model_max_length": 2048,
            "pad_token": None,
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
        },
    )
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


def test_a_converted_folder_has_it(tmp_path):
    """And the text behind an image starts with a word boundary, as where pieces of a prompt are encoded one by one."""
    src = ck.make_official(tmp_path, tokenizer=False)
    write(src)
    convert_official(src, tmp_path / "stf")
    processor = AutoProcessor.from_pretrained(tmp_path / "stf")
    ids = processor(images=Image.new("RGB", (9, 9)), text="U:<image>\ncat", return_tensors="pt")["input_ids"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["<s>", "▁", "U", ":", *["<image>"] * 4, "▁", "<0x0A>", "cat"]

    processor.save_pretrained(tmp_path / "once")
    AutoProcessor.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = AutoProcessor.from_pretrained(tmp_path / "twice")
    assert again.tokenizer("U:<image>\ncat")["input_ids"] == processor.tokenizer("U:<image>\ncat")["input_ids"]
    assert again.tokenizer.model_max_length == 2048


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_keep_their_ids(tmp_path, file):
    """A fine-tuned checkpoint may have embeddings behind the pieces; the image token comes behind those."""
    src = ck.make_official(tmp_path, tokenizer=False)
    write(src)
    known = len(read_sentencepiece(src).get_vocab())
    settings = json.loads((src / "tokenizer_config.json").read_text())
    decoder = {str(i): {"content": token} for i, token in ((1, "<s>"), (known, "[PAD]"), (known + 1, "<stop>"))}
    if file == "added_tokens.json":
        ck.write_json(src / file, {"<stop>": known + 1, "[PAD]": known})
    else:
        ck.write_json(src / file, settings | {"added_tokens_decoder": decoder})
    convert_official(src, tmp_path / "stf")
    processor = AutoProcessor.from_pretrained(tmp_path / "stf")
    assert processor.tokenizer.convert_tokens_to_ids(["[PAD]", "<stop>"]) == [known, known + 1]
    assert processor.image_token_id == known + 2
    assert processor.tokenizer.tokenize("ab<stop>") == ["▁ab", "<stop>"]

    ck.write_json(src / "added_tokens.json", {"<other>": known + 5})
    with pytest.raises(
        ConversionError, match=rf"added token '<other>': expected id \d+, the next one, got {known + 5}"
    ):
        convert_official(src, tmp_path / "again")
    ck.write_json(src / "added_tokens.json", {"<other>": "x", "<another>": known})
    with pytest.raises(ConversionError, match=r"tokenizer_config\.json or added_tokens\.json: expected valid values"):
        convert_official(src, tmp_path / "again")


def test_another_kind_of_model_is_refused(tmp_path):
    write(tmp_path, kind=1)
    with pytest.raises(ValueError, match=r"tokenizer\.model: expected a byte-pair model.*another kind"):
        read_sentencepiece(tmp_path)
