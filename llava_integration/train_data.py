"""Conversations in LLaVA's format, and the batches of a training on their answers.

    [{"image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human", "value": "<image>\nQ"},
                                                           {"from": "gpt", "value": "A"}, ...]}, ...]

labels[t] = input_ids[t] where token t belongs to an answer or to the end-of-text token behind it, else -100.
The file is a JSON array or a record a line; all of it is checked at once, images are opened when their turn comes.
"""

import json
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from .train_cache import DataError, FeatureCache, open_image

IGNORED = -100
SHOWN = 20  # bad records that a message lists
ROLES = {"human": "user", "gpt": "assistant"}


class Record(NamedTuple):
    """A record as it is kept: small, so that a million fit into memory."""

    line: int
    images: list[str]
    ids: array  # one image token an image
    answers: list[tuple[int, int]]  # first and last + 1 of the ids that are learnt


def objects(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """(line, object) of `text`, whose JSON objects stand in an array or one behind the other."""
    position, line, counted, decoder = 0, 1, 0, json.JSONDecoder()
    while True:
        while position < len(text) and text[position] in "[], \t\r\n":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if position == len(text):
            return
        try:
            found, position = decoder.raw_decode(text, position)
        except JSONDecodeError as error:
            raise DataError(f"{name}: line {error.lineno}: no JSON ({error.msg}); is the file cut short?") from None
        yield line, found


class Conversations(Dataset):
    """Records as {"input_ids", "labels": lists with one image token an image, "images" or "blocks": one an image}.

    Args:
        file: records, in LLaVA's format.
        images: folder that the records' image names start from.
        processor: of the model; its chat template makes the prompts.
        max_length: tokens that the model takes, images included.
        image_tokens: tokens an image becomes, or what counts those of a record's images together.
        need_images: refuse records without an image, from which a projector alone learns nothing.
        skip_bad: leave bad records out and say so, instead of raising.
        cache: gives "blocks" in place of "images".

    Raises DataError naming the lines of bad records: not LLaVA's format, an image that is not there, too long.
    """

    def __init__(
        self,
        file: Path,
        images: Path,
        processor: ProcessorMixin,
        *,
        max_length: int,
        image_tokens: int | Callable[[list[Path]], int],
        need_images: bool = False,
        skip_bad: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        self.file, self.folder, self.processor, self.cache, self.skip_bad = file, images, processor, cache, skip_bad
        self.records: list[Record] = []
        self.lengths: list[int] = []
        bad = []
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from None
        for line, found in tqdm(objects(text, str(file)), desc="records", unit="", disable=None):
            try:
                names, turns = parse(found)
                files = [images / name for name in names]
                if missing := [name for name in files if not name.is_file()]:
                    raise DataError(f"image: {missing[0]} does not exist")
                record = Record(line, names, *encode(processor, turns))
                if need_images and not names:
                    raise DataError("image: expected one, for a projector learns from nothing else; got none")
                tokens = image_tokens(files) if callable(image_tokens) else image_tokens * len(files)
                length = len(record.ids) - len(files) + tokens
                if length > max_length:
                    raise DataError(f"conversations: expected at most {max_length} tokens, got {length}; cut it")
            except DataError as error:
                bad.append(f"{file}: line {line}: {error}")
                continue
            self.records.append(record)
            self.lengths.append(length)
        listed = "\n".join([*bad[:SHOWN], *[f"and {len(bad) - SHOWN} more"] * (len(bad) > SHOWN)])
        if bad and not skip_bad:
            raise DataError(f"{listed}\n{len(bad)} bad record(s); mend them, or leave them out: --skip-bad-records")
        if bad:
            print(f"{listed}\n{len(bad)} bad record(s) left out", file=sys.stderr)
        if not self.records:
            raise DataError(f"{file}: expected records, found none that can be used")

    def files_of(self, index: int) -> list[Path]:
        return [self.folder / name for name in self.records[index].images]

    def image_files(self) -> list[Path]:
        """Every image once, in the order of the records."""
        return list(dict.fromkeys(file for index in range(len(self)) for file in self.files_of(index)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        labels = [IGNORED] * len(record.ids)
        for first, last in record.answers:
            labels[first:last] = record.ids[first:last]
        kind, read = ("blocks", self.cache.__getitem__) if self.cache else ("images", open_image)
        try:
            return {"input_ids": list(record.ids), "labels": labels, kind: [read(f) for f in self.files_of(index)]}
        except DataError as error:
            where = f"{self.file}: line {record.line}: {error}"
            if not self.skip_bad:
                raise DataError(where) from None
            print(f"{where}; the next record takes its place", file=sys.stderr)
            return self[(index + 1) % len(self)]


def tile_tokens(model: PreTrainedModel) -> Callable[[list[Path]], int]:
    """What counts the tokens of a record's images for a model of tiles, whose number follows from an image's size."""
    grouped = hasattr(model.config, "vision_aspect_ratio")  # LLaVA-OneVision: images that share a prompt are one tile

    def count(files: list[Path]) -> int:
        sizes = [upright_size(file) for file in files]
        return sum(model.model.image_token_counts(None, sizes, [len(sizes)] if grouped else None)) if sizes else 0

    return count


def upright_size(file: Path) -> tuple[int, int]:
    """(height, width) of an image that is not decoded, after the rotation that its EXIF asks for."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size if turned else image.size[::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image: {file} does not decode ({error})") from None


def parse(record: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Image names, and turns in the form of chat templates with the images in front; DataError for another format."""
    if not isinstance(record, dict):
        raise DataError(f"expected an object with conversations, got {type(record).__name__}")
    names, said = record.get("image") or [], record.get("conversations")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"image: expected a file name or a list of them, got {names!r}")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise DataError("conversations: expected questions and answers in turns, none of them alone")
    turns, found = [], 0
    for index, turn in enumerate(said):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker != (expected := ("human", "gpt")[index % 2]) or not isinstance(value, str):
            raise DataError(f"conversations: expected a text from {expected!r} in turn {index}, got {turn!r:.80}")
        here = value.count("<image>")
        if here and speaker == "gpt":
            raise DataError(f"conversations: expected no <image> in the answer of turn {index}")
        words = {"type": "text", "text": value.replace("<image>", "").strip()}
        turns.append({"role": ROLES[speaker], "content": [{"type": "image"}] * here + [words]})
        found += here
    if found != len(names):
        raise DataError(f"conversations: expected {len(names)} <image>, one for each image, got {found}")
    return names, turns


def encode(processor: ProcessorMixin, turns: Sequence[dict[str, Any]]) -> tuple[array, list[tuple[int, int]]]:
    """ids of the conversation in the words of the chat template, and the ranges of them that are answers.

    These end with the end-of-text token, and hold whatever shares a character with them.
    """
    text, seen, spans, end = "", "", [], processor.tokenizer.eos_token
    for index in range(0, len(turns), 2):
        asked = processor.apply_chat_template(turns[: index + 1], add_generation_prompt=True)
        answered = processor.apply_chat_template(turns[: index + 2])
        if not asked.startswith(seen) or not answered.startswith(asked):
            raise DataError("chat_template: expected one that only adds text at its end from turn to turn")
        text += asked[len(seen) :]
        answer, seen = answered[len(asked) :].rstrip(), answered
        answer = answer.removesuffix(end) + end  # many templates close no answer: a model would never learn to stop
        spans.append((len(text), len(text) + len(answer)))
        text += answer
    encoded, ranges = processor.tokenizer(text, return_offsets_mapping=True), []
    for begin, stop in spans:
        where = enumerate(encoded["offset_mapping"])
        inside = [i for i, (first, last) in where if first < stop and begin < last and first < last]
        if len(inside) < 2:
            raise DataError("conversations: expected answers with text in them, got an empty one")
        ranges.append((inside[0], inside[-1] + 1))
    return array("i", encoded["input_ids"]), ranges


class ByLength(LengthGroupedSampler):
    """Records of about one length together; the order of an epoch depends on the seed and its number alone.

    So a run that goes on in the middle of an epoch has the records left that it had not seen.
    """

    def __init__(self, trainer: Trainer, lengths: list[int]):
        arguments = trainer.args
        whole = arguments.train_batch_size * arguments.gradient_accumulation_steps
        super().__init__(whole, lengths=lengths, generator=torch.Generator())
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.trainer.args.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


class Collator:
    """Items of Conversations -> input_ids, attention_mask, labels [B, S], padded on the right, and their images.

    These are what the image processor makes of all images of the batch in order, or image_blocks [N, M, T, C] with
    `image_tokens` tokens each; neither without any.
    """

    def __init__(self, processor: ProcessorMixin, image_token_id: int, image_tokens: int) -> None:
        self.processor, self.image_token_id, self.image_tokens = processor, image_token_id, image_tokens

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch, counts = {}, []
        if blocks := [block for item in items for block in item.get("blocks", ())]:
            batch, counts = {"image_blocks": torch.stack(blocks)}, [self.image_tokens] * len(blocks)
        if images := [item["images"] for item in items if item.get("images")]:
            batch = dict(self.processor.image_processor(images, return_tensors="pt"))
            for index in range(sum(map(len, images))):
                tokens = self.processor.replace_image_token(batch, index)
                counts.append(tokens.count(self.processor.image_token))
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        rows: dict[str, list[Tensor]] = {name: [] for name in padding}
        left = iter(counts)
        for item in items:
            ids, labels = torch.tensor(item["input_ids"]), torch.tensor(item["labels"])
            repeats = torch.tensor([next(left) if token == self.image_token_id else 1 for token in item["input_ids"]])
            for name, row in zip(padding, (ids, labels, torch.ones_like(ids)), strict=True):
                rows[name].append(row.repeat_interleave(repeats))
        return batch | {name: pad_sequence(rows[name], True, fill) for name, fill in padding.items()}
