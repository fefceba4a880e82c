"""tokenizer.model -> a Llama tokenizer, without the sentencepiece and protobuf packages.

The file is one protobuf message; of it, field 1 repeats a piece: {1: text, 2: score, 3: type}. A byte-pair model merges
the pair whose result has the best score, and its pieces lie in that order: the id of a piece is the rank of its merge.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken
from transformers import LlamaTokenizer

from .checkpoint import read_json
from .errors import ConversionError

ADDED_FILE = "added_tokens.json"
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
PIECES, TRAINER = 1, 2
MODEL_TYPE, BYTE_PAIR = 3, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def read_llama_tokenizer(folder: Path) -> LlamaTokenizer:
    """The tokenizer of tokenizer.model, with the settings and added tokens of the JSON files beside it."""
    file = folder / "tokenizer.model"
    try:
        pieces, kinds = read_pieces(file.read_bytes())
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise ConversionError(
            f"{file}: expected a byte-pair model of sentencepiece, got {error}; get the file again"
        ) from error
    if not pieces:
        raise ConversionError(f"{file}: expected a byte-pair model of sentencepiece, got no pieces; get the file again")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    mergeable = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == NORMAL}
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    tokens = {}
    for name, default in (("unk_token", UNKNOWN), ("bos_token", None), ("eos_token", None), ("pad_token", None)):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None and default is not None and default in kinds:
            token = pieces[kinds.index(default)]
        if token is not None:
            tokens[name] = token
    options = {
        name: settings[name]
        for name in (
            "add_bos_token",
            "add_eos_token",
            "model_max_length",
            "padding_side",
            "clean_up_tokenization_spaces",
        )
        if settings.get(name) is not None
    }
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=_merges(vocabulary, mergeable), **tokens, **options)
    _add_tokens(tokenizer, folder, settings)
    return tokenizer


def _add_tokens(tokenizer: LlamaTokenizer, folder: Path, settings: dict) -> None:
    """The tokens of added_tokens.json and of added_tokens_decoder that are no pieces, under the ids they have there."""
    added = read_json(folder / ADDED_FILE) if (folder / ADDED_FILE).is_file() else {}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        added.setdefault(token["content"] if isinstance(token, dict) else token, int(index))
    present = tokenizer.get_vocab()
    for token, index in sorted(added.items(), key=lambda item: item[1]):
        if token not in present:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        if (got := tokenizer.convert_tokens_to_ids(token)) != index:
            raise ConversionError(
                f"{folder}: added token {token!r}: expected id {got}, the next one, got {index}; get the files again"
            )


def read_pieces(message: bytes) -> tuple[list[str], list[int]]:
    """Text and type of every piece, in the order of their ids; ValueError for another kind of model."""
    pieces, kinds = [], []
    for number, value in _fields(message):
        if number == PIECES:
            content = dict(_fields(value))
            pieces.append(content[1].decode("utf-8"))
            kinds.append(content.get(3, NORMAL))
        elif number == TRAINER and dict(_fields(value)).get(MODEL_TYPE, 1) != BYTE_PAIR:
            raise ValueError("a model of another kind")
    return pieces, kinds


def _merges(vocabulary: dict[str, int], mergeable: set[str]) -> list[tuple[str, str]]:
    merges = []
    for piece in vocabulary:
        if piece in mergeable:
            cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            cuts = [cut for cut in cuts if cut[0] in mergeable and cut[1] in mergeable]
            merges += sorted(cuts, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    return merges


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a protobuf message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(message, position)
        elif wire in (FIXED64, FIXED32, BYTES):
            length = {FIXED64: 8, FIXED32: 4}.get(wire)
            if length is None:
                length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
            if position > len(message):
                raise ValueError("a truncated file")
        else:
            raise ValueError(f"a field of wire type {wire}")
        yield number, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
