"""Questions on real images, in LLaVA's format: python examples/real_questions.py OUT

`python -m llava_integration.train` reads them, and `python -m bench.quality` asks them.

    OUT/images/*.png   64x64: 5,000 of easy-vqa, one coloured shape each; boards of 4x4 handwritten digits
    OUT/train.json     [{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}...]}...]
    OUT/scenes.json    such questions with the scene written as words in place of the image
    OUT/patches.json   {image: [17 classes]} of the training images: the shape, then what stands in each patch
    OUT/test.jsonl     {"question_id", "image", "text", "answer", "kind"} a line

easy-vqa (MIT licence) and scikit-learn's digits (UCI, CC BY 4.0) are in their packages; nothing is fetched. Digits that
stand on a board of the test are on none of the training. What a digit is, which of two neighbours is larger, and
how many sevens there are cannot be told from an average of patches that hold one digit each.
"""

import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SIDE, PIXELS = 4, 16  # digits along a board, pixels along a digit, which is a patch of the tower
ROWS = "ABCD"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
DETAIL = ("digit", "larger", "count")  # kinds of questions on boards
COARSE = ("shape", "colour", "yes/no")  # kinds of questions on easy-vqa
TRAINED = ("read", "digit", "digit", "larger", "larger", "count")  # the turns of a training board
SCENES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
IGNORED = -100  # a class that is not trained on
TRAINING_DIGITS = 1297  # of 1,797 in scikit-learn; the others are drawn for the test
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{% for c in m['content'] %}"
    "{{ '<image>\n' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

Cell, Board = tuple[int, int], list[list[int]]
CELLS = [(row, column) for row in range(SIDE) for column in range(SIDE)]
Turn = tuple[str, str, str]  # question, answer, kind


def cell(row: int, column: int) -> str:
    return f"{ROWS[row]}{column + 1}"


def ask(board: Board, kind: str, draw: random.Random, at: Cell | None = None, beside: Cell | None = None) -> Turn:
    """A question on a board, on the cells `at` and `beside` or any. Nothing is known of a cell that holds -1."""
    row, column = at or draw.choice(CELLS)
    if kind == "digit":
        return f"Which digit stands in {cell(row, column)}?", str(board[row][column]), kind
    if kind == "larger":
        if beside is None:
            column = draw.randrange(SIDE - 1)
            beside = row, column + 1
        larger = board[row][column] > board[beside[0]][beside[1]]
        return f"Is {cell(row, column)} larger than {cell(*beside)}?", "yes" if larger else "no", kind
    if kind == "read":
        cells = (f"{cell(row, column)} {board[row][column]}" for column in range(SIDE))
        return f"Read row {ROWS[row]}.", " ".join(cells), kind
    return "How many sevens are there?", str(sum(line.count(7) for line in board)), kind


def board_record(draw: random.Random, split: str) -> tuple[Board, str, list[Turn]]:
    """A board, a word for each of its patches, such as B3=7, and questions on it."""
    board = [[draw.randrange(10) for _ in range(SIDE)] for _ in range(SIDE)]
    kinds = draw.sample(TRAINED, len(TRAINED)) if split == "train" else DETAIL
    return board, in_words(board, CELLS), [ask(board, kind, draw) for kind in kinds]


def in_words(board: Board, cells: Sequence[Cell]) -> str:
    return " ".join(f"{cell(row, column)}={board[row][column]}" for row, column in cells)


def few_words(draw: random.Random, count: int) -> tuple[str, list[Turn]]:
    """So many cells of a board and questions on these: from few, what a word says is learnt sooner."""
    board, shown = board_record(draw, "train")[0], draw.sample(CELLS, count)
    said = " ".join(f"{cell(row, column)} {board[row][column]}" for row, column in sorted(shown))
    turns = [ask(board, "digit", draw, draw.choice(shown)) for _ in range(3)]
    turns += [ask(board, "larger", draw, *draw.sample(shown, 2)) for _ in range(2 if count > 1 else 0)]
    known = [[board[row][column] if (row, column) in shown else -1 for column in range(SIDE)] for row in range(SIDE)]
    turns.append(ask(known, "count", draw))
    turns.append(("Read the board.", said, "read"))
    return in_words(board, shown), draw.sample(turns, len(turns))


def draw_board(board: Board, digits: dict[int, Any], draw: random.Random) -> Any:
    """PIL image of a board, every digit by another hand."""
    import numpy
    from PIL import Image

    rows = [numpy.hstack([draw.choice(digits[digit]) for digit in row]) for row in board]
    return Image.fromarray((numpy.vstack(rows) * 15).astype("uint8")).convert("RGB")


def easy_scenes(split: str) -> Iterator[tuple[Path, str, list[Turn]]]:
    """(image, scene in words, questions) of easy-vqa's images of which color and shape can be told from the answers."""
    import easy_vqa

    folder = Path(easy_vqa.__file__).parent / "data" / split
    asked: dict[int, list[Turn]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        kind = "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes/no"
        asked.setdefault(image, []).append((question[0].upper() + question[1:], answer, kind))
    for image, turns in sorted(asked.items()):
        yield folder / "images" / f"{image}.png", scene_of(turns), turns


def scene_of(turns: list[Turn]) -> str:
    """What questions and answers say about the one shape, as words: "blue rectangle"; "" where they leave it open."""
    found = {}
    for kind, names in (("colour", COLOURS), ("shape", SHAPES)):
        left = set(names)
        for question, answer, _ in turns:
            named = set(names).intersection(question.lower().rstrip("?").split())
            positive = (answer == "yes") != (" not " in question or " no " in question)
            if answer in names:
                left &= {answer}
            elif answer in ("yes", "no"):
                left = left & named if named and positive else left - named
            else:
                left &= named or left  # "what shape is the blue ..." takes the colour for granted
        found[kind] = left.pop() if len(left) == 1 else ""
    return f"{found['colour']} {found['shape']}" if all(found.values()) else ""


def conversation(start: str, turns: list[Turn]) -> list[dict[str, str]]:
    said = []
    for index, (question, answer, _) in enumerate(turns):
        said.append({"from": "human", "value": question if index else f"{start}\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return said


def make(out: Path, boards: int = 4000, easy: int = 4000, scenes: int = 12000, test_boards: int = 500) -> None:
    """Write a data set into `out`: so many boards, images of easy-vqa and scenes, 2 * test_boards test images."""
    import numpy
    from sklearn.datasets import load_digits

    draw, (pictures, labels) = random.Random(0), load_digits(return_X_y=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    asked: dict[str, list[tuple[str, list[Turn]]]] = {"train": [], "test": []}
    words, patches = [], {}
    for split, found in asked.items():
        training = split == "train"
        count = boards if training else test_boards
        own = slice(TRAINING_DIGITS) if training else slice(TRAINING_DIGITS, None)
        digits: dict[int, list] = {digit: [] for digit in range(10)}
        for picture, label in zip(pictures[own], labels[own], strict=True):
            digits[int(label)].append(numpy.kron(picture.reshape(8, 8), numpy.ones((PIXELS // 8, PIXELS // 8))))
        for index in range(count):
            name, (board, _, turns) = f"board-{split}-{index}.png", board_record(draw, split)
            draw_board(board, digits, draw).save(out / "images" / name)
            found.append((name, turns))
            patches[name] = [IGNORED, *(digit for row in board for digit in row)]
        for path, scene, turns in itertools.islice(easy_scenes(split), easy if training else count):
            name = f"easy-{split}-{path.name}"
            shutil.copyfile(path, out / "images" / name)
            found.append((name, draw.sample(turns, min(len(turns), 5 if training else 2))))
            patches[name] = [SCENES.index(scene) if scene else IGNORED, *[IGNORED] * SIDE**2]
            if training and scene:
                words.append((scene, turns[:5]))
    for _ in range(scenes):
        count = draw.choice((1, 2, 4, 8, len(CELLS)))
        words.append(board_record(draw, "train")[1:] if count == len(CELLS) else few_words(draw, count))
    draw.shuffle(asked["train"])
    draw.shuffle(words)
    train = [{"id": name, "image": name, "conversations": conversation("<image>", t)} for name, t in asked["train"]]
    records = [{"conversations": conversation(scene, turns)} for scene, turns in words]
    for name, content in (("train", train), ("scenes", records), ("patches", patches)):
        (out / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    fields, turns = ("image", "text", "answer", "kind"), [(name, *turn) for name, t in asked["test"] for turn in t]
    test = [{"question_id": i, **dict(zip(fields, turn, strict=True))} for i, turn in enumerate(turns)]
    (out / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in test), encoding="utf-8")


def make_processor(folder: Path) -> Any:
    """That of a LLaVA-1.5 of 64x64 pixels whose tokens are the words of the data in `folder`, one each."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[?,.]"), "")])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = ["USER: ASSISTANT:"]
    for name in ("scenes", "train"):
        for record in json.loads((folder / f"{name}.json").read_text(encoding="utf-8")):
            texts += [turn["value"].replace("<image>", "") for turn in record["conversations"]]
    made.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=list(SPECIAL)))
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    special: Any = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    special["extra_special_tokens"] = {"image_token": "<image>"}
    tokenizer, side = PreTrainedTokenizerFast(tokenizer_object=made, **special), SIDE * PIXELS
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(images, tokenizer, PIXELS, "default", TEMPLATE, num_additional_image_tokens=1)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python examples/real_questions.py OUT    writes into the folder OUT")
    try:
        make(Path(sys.argv[1]))
    except ImportError as error:
        sys.exit(f"{error.name} is missing: pip install easy-vqa scikit-learn")
