"""If this fails, a model is trained on what it was asked, or never learns to stop; or lengths are miscounted."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from llava_integration import LlavaStfProcessor, train_data
from llava_integration.convert.processor import VICUNA_V1
from llava_integration.train_data import Collator, Conversations
from tests.learn.conftest import record, write_data
from tests.llava import build

SIZES = {"max_length": 512, "image_tokens": 4}


def words(tokenizer, labels):
    return ["-" if label == -100 else tokenizer.convert_ids_to_tokens(int(label)) for label in labels]


def test_the_mask_token_by_token(tmp_path, processor):
    """Two turns: both answers with their ends, and nothing of questions, roles, images or padding."""
    data = write_data(tmp_path, [record(0, 2), record(1, 1)])
    records = Conversations(data, tmp_path, processor, **SIZES)
    batch = Collator(LlavaStfProcessor.from_llava(processor), build.IMAGE_TOKEN, 4)([records[0], records[1]])
    tokenizer = processor.tokenizer
    question = ["USER", "what", "is", "in", "the", "picture", "ASSISTANT"]
    first = [question[0], *["<image>"] * 4, *question[1:], "a", "cat", "</s>", *question, "a", "dog", "</s>"]
    second = [question[0], *["<image>"] * 4, *question[1:], "a", "dog", "</s>"]
    padding = len(first) - len(second)
    assert words(tokenizer, batch["input_ids"][0]) == first
    assert words(tokenizer, batch["input_ids"][1]) == [*second, *["<pad>"] * padding]
    answers = ["a", "cat", "</s>", *["-"] * 7, "a", "dog", "</s>"]
    assert words(tokenizer, batch["labels"][0]) == [*["-"] * 11, *answers]
    assert words(tokenizer, batch["labels"][1]) == [*["-"] * 11, "a", "dog", "</s>", *["-"] * padding]
    assert batch["attention_mask"].sum(1).tolist() == [len(first), len(second)] == records.lengths
    assert batch["pixel_values"].shape == (2, 3, build.PIXELS, build.PIXELS)


@pytest.fixture
def vicuna(processor):
    """Tokens that start with the space before them, as Llama's, and the template that LLaVA was trained with."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = ["USER: ASSISTANT: What is it? A rocket. Is it red? No, white."] * 4
    special = ["<unk>", "<s>", "</s>", "<pad>", AddedToken("<image>", special=True, normalized=False)]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False))
    options = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    options["extra_special_tokens"] = {"image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **options)
    return LlavaProcessor(processor.image_processor, tokenizer, patch_size=build.PATCH, chat_template=VICUNA_V1)


def test_the_mask_of_tokens_that_begin_with_a_space(tmp_path, vicuna):
    """What is learnt reads as the answers, whole, and the prompt is the one that the chat template makes."""
    said = ["<image>\nWhat is it?", "A rocket.", "Is it red?", "No, white."]
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(said)]
    data = write_data(tmp_path, [record(0, conversations=turns)])
    item = Conversations(data, tmp_path, vicuna, **SIZES)[0]
    learnt = [label for label in item["labels"] if label != -100]
    assert vicuna.tokenizer.decode(learnt) == "A rocket.</s> No, white.</s>"
    prompt = vicuna.apply_chat_template(train_data.parse(record(0, conversations=turns))[1])
    assert item["input_ids"] == vicuna.tokenizer(prompt)["input_ids"]


def test_a_record_a_line_is_the_same(tmp_path, data, processor):
    lines = "\n".join(json.dumps(entry) for entry in json.loads(data.read_text()))
    (tmp_path / "data.jsonl").write_text(lines)
    one, other = (Conversations(file, data.parent, processor, **SIZES) for file in (data, tmp_path / "data.jsonl"))
    assert [entry.line for entry in one.records] == list(range(2, 10))
    assert [entry.line for entry in other.records] == list(range(1, 9))
    assert all(one[index]["labels"] == other[index]["labels"] for index in range(8))


def test_images_are_opened_when_their_turn_comes(data, processor, monkeypatch):
    opened = []
    monkeypatch.setattr(train_data, "open_image", opened.append)
    records = Conversations(data, data.parent, processor, **SIZES)
    assert opened == []
    records[3]
    assert [path.name for path in opened] == ["3.png"]


def test_several_images_stay_in_order(tmp_path, processor):
    turns = [{"from": "human", "value": "<image> <image> what is"}, {"from": "gpt", "value": "a cat"}]
    data = write_data(tmp_path, [record(0, image=["1.png", "0.png"], conversations=turns), record(1)])
    records = Conversations(data, tmp_path, processor, **SIZES)
    batch = Collator(LlavaStfProcessor.from_llava(processor), build.IMAGE_TOKEN, 4)([records[1], records[0]])
    expected = processor.image_processor([build.image(index) for index in (1, 1, 0)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert (batch["input_ids"] == build.IMAGE_TOKEN).sum(1).tolist() == [4, 8]
