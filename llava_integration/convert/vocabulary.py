"""The image token and the padded vocabulary: 32000 rows become 32064, as in transformers' LLaVA checkpoints.

New rows are the mean of the old ones: in the head their logit is the average logit, so they never win by accident.
"""

from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .checkpoint import Entries, Entry
from .errors import ConversionError

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
MULTIPLE = 64
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Vocabulary:
    """`rows` is what the embeddings need."""

    rows: int
    image_token_id: int
    pad_token_id: int


def without_tokenizer(rows: int) -> Vocabulary:
    """The ids that the tokens get behind `rows` embeddings, as in transformers' LLaVA checkpoints."""
    return Vocabulary(_padded(rows + 2), rows, rows + 1)


def add_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """Give `tokenizer` an image and a padding token, in place; `rows`: embeddings that the checkpoint has."""
    present = tokenizer.get_vocab()
    last = max((index for token, index in present.items() if token not in (IMAGE_TOKEN, PAD_TOKEN)), default=-1)
    if last >= rows:
        raise ConversionError(
            f"tokenizer: expected ids below {rows}, the rows of the checkpoint's embeddings, got {last}; there is no "
            f"room for {IMAGE_TOKEN}: give SRC the tokenizer it was trained with"
        )
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        # The unknown token as padding, as LLaVA has it, would mask unknown words in training.
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, normalized=False, special=True)})
    image, pad = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.pad_token_id
    if tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False) != [image]:
        raise ConversionError(
            f"tokenizer: expected {IMAGE_TOKEN} to be one token after adding it, got "
            f"{tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)}; give SRC a tokenizer that takes new tokens"
        )
    needed = max(image, pad, last) + 1
    return Vocabulary(_padded(needed) if needed > rows else rows, image, pad)


def resize(entries: Entries, rows: int) -> Entries:
    """`entries` whose embeddings and head have `rows` rows."""
    return entries | {
        name: _resized(entries[name], rows) for name in (EMBEDDINGS, HEAD) if name in entries and entries[name].shape
    }


def _resized(entry: Entry, rows: int) -> Entry:
    old, *rest = entry.shape
    if old >= rows:
        return entry

    def read() -> Tensor:
        weight = entry.read()
        mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
        return torch.cat([weight, mean.expand(rows - old, *rest)])

    return Entry((rows, *rest), entry.dtype, read, entry.origin, "resized")


def _padded(rows: int) -> int:
    return -(-rows // MULTIPLE) * MULTIPLE
