"""Answers of a model to a question file, and how many are right.

    FILE    a line: {"image", "text", "answer" or "answers": [...], "question_id", "kind" or "category"}, as LLaVA's
    OUT     a line: {"question_id", "text", "exact", "vqa", "kind"}; questions that it holds are not asked again

exact    the answer is one of those given, after lower case, without articles and punctuation
vqa      mean over the people asked of min(1, agreeing others / 3), arXiv 1505.00468; for one answer as exact
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..command import BadInput

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LEFT_OUT = ("a", "an", "the")


def plain(answer: str) -> str:
    words = re.findall(r"[\w']+(?:\.\d+)?", answer.lower())
    words = [str(NUMBERS.index(word)) if word in NUMBERS else word for word in words if word not in LEFT_OUT]
    return " ".join(words)


def grade(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact, vqa) of an answer, each from 0 to 1."""
    agree = [plain(answer) == plain(said) for answer in answers]
    if len(answers) == 1:
        return float(agree[0]), float(agree[0])
    others = [sum(agree) - own for own in agree]
    return float(any(agree)), sum(min(1.0, count / 3) for count in others) / len(answers)


def read(file: Path, images: Path) -> list[dict[str, Any]]:
    """The questions; BadInput names the line of one without text, image or answer."""
    questions = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            entry = json.loads(line)
            answers = entry["answers"] if "answers" in entry else [entry["answer"]]
            text, image = entry["text"], images / entry["image"]
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{where}: expected JSON with image, text and answer ({error})") from None
        if not answers or not all(isinstance(said, str) for said in (text, *answers)):
            raise BadInput(f"{where}: image, text, answer: expected strings, got {[text, *answers]!r}")
        if not image.is_file():
            raise BadInput(f"{where}: image: {image} does not exist")
        known = {"id": entry.get("question_id", number), "kind": entry.get("kind") or entry.get("category") or "all"}
        questions.append({"text": text, "image": image, "answers": answers, "where": where, **known})
    return questions


def answered(out: Path) -> dict[Any, dict[str, Any]]:
    """The whole lines of an answer file, which an interruption may have cut short."""
    if not out.exists():
        return {}
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(out, len(whole))  # killed while it is written anew, a run would lose every answer
    return {entry["question_id"]: entry for entry in map(json.loads, whole.splitlines())}


def ask(model: Any, processor: Any, questions: Sequence[dict[str, Any]], tokens: int) -> Iterator[str]:
    """Greedy answers of at most so many tokens, to all questions at once."""
    import torch

    from llava_integration.train_cache import DataError, open_image

    images, prompts = [], []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question["text"].replace("<image>", "").strip()}]
        turn = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
        try:
            images.append(open_image(question["image"]))
        except DataError as error:
            raise BadInput(f"{question['where']}: {error}") from None
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    yield from processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def score(model: Any, processor: Any, questions: list, out: Path, *, batch: int, tokens: int) -> dict[str, Any]:
    """Ask what `out` does not hold yet -> {"exact": {kind: mean}, "vqa": {kind: mean}}."""
    from tqdm import tqdm

    known = answered(out)
    left = sorted((q for q in questions if q["id"] not in known), key=lambda question: len(question["text"]))
    with out.open("a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(left), batch), desc="questions", unit=f"x{batch}", disable=None):
            part = left[start : start + batch]
            for question, text in zip(part, ask(model, processor, part, tokens), strict=True):
                exact, vqa = grade(text, question["answers"])
                entry = {"question_id": question["id"], "text": text.strip(), "exact": exact, "vqa": vqa}
                known[question["id"]] = entry | {"kind": question["kind"]}
                file.write(json.dumps(known[question["id"]]) + "\n")
            file.flush()
    kinds = sorted({question["kind"] for question in questions})

    def means(measure: str) -> dict[str, float]:
        return {kind: mean(known[q["id"]][measure] for q in questions if q["kind"] == kind) for kind in kinds}

    return {measure: means(measure) for measure in ("exact", "vqa")}
