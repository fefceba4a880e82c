"""If this fails, the study of answers against tokens asks wrong questions, miscounts, or loses finished rows."""

import json
import re
from collections import Counter

import pytest

import bench.quality.__main__ as command
from bench.command import BadInput
from bench.quality import score
from bench.results import read
from tests.learn.conftest import ANSWERS
from tests.llava import build


@pytest.mark.parametrize(
    ("said", "answers", "exact", "vqa"),
    [
        ("A cat.", ["cat"], 1, 1),
        ("two", ["2"], 1, 1),
        ("a dog", ["cat"], 0, 0),
        ("red", ["red"] * 3 + ["blue"] * 7, 1, 0.9),  # 3 people see 2 others agree, 7 see 3
        ("red", ["red"] + ["blue"] * 9, 1, 0.3),
        ("green", ["red"] * 10, 0, 0),
    ],
)
def test_an_answer_is_graded_as_people_agree(said, answers, exact, vqa):
    assert score.grade(said, answers) == (exact, pytest.approx(vqa))


@pytest.fixture
def questions(tmp_path):
    """A file of seven questions on three images."""
    for index in range(3):
        build.image(index).save(tmp_path / f"{index}.png")
    asked = ["what", "what is", "what is in the picture", "is a cat in the picture", "what is a dog"]
    asked += ["is", "a cat and a dog"]
    lines = [{"image": f"{i % 3}.png", "text": text, "answer": ANSWERS[0]} for i, text in enumerate(asked)]
    lines = [{"question_id": i, **line} for i, line in enumerate(lines)]
    lines[5]["kind"] = "short"
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "questions.jsonl"


class TestCheckpoint:
    def run(self, folder, questions, *options):
        answers = questions.with_name("answers.jsonl")
        given = ["--checkpoint", str(folder), "--questions", str(questions), "--answers", str(answers), *options]
        return command.main([*given, "--tokens", "3"]), answers

    @pytest.mark.parametrize("kind", ["stf_folder", "stock_folder"])
    def test_answers_in_batches_are_the_answers_one_by_one(self, questions, kind, request, capsys):
        folder = request.getfixturevalue(kind)
        found = []
        for batch in ("1", "4"):
            code, answers = self.run(folder, questions, "--batch", batch)
            assert code == 0
            found.append({entry["question_id"]: entry["text"] for entry in map(json.loads, answers.open())})
            answers.unlink()
        assert found[0] == found[1]
        assert set(found[0]) == set(range(7))
        assert re.search(r"short +0\.0 +0\.0", capsys.readouterr().out)

    def test_an_interrupted_run_asks_what_is_left(self, questions, stf_folder, monkeypatch):
        """A line that was cut short is asked again."""
        answers = self.run(stf_folder, questions)[1]
        whole = answers.read_text()
        answers.write_text("".join(whole.splitlines(keepends=True)[:4]) + '{"question_id": ')
        asked, ask = [], score.ask
        monkeypatch.setattr(score, "ask", lambda m, p, part, t: asked.extend(part) or ask(m, p, part, t))
        assert self.run(stf_folder, questions)[0] == 0
        assert len(asked) == 3
        assert answers.read_text() == whole

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image": "none.png", "text": "a", "answer": "b"}', r"line 8: image: \S+none\.png does not exist"),
            ('{"image": "0.png", "text": "a"}', "line 8: expected JSON with image, text and answer"),
            ('{"image": "0.png", "text": 7, "answer": "b"}', "line 8: image, text, answer: expected strings"),
            ('{"image": "0.png", "text"', "line 8: expected JSON"),
        ],
    )
    def test_a_question_is_named_by_its_line(self, questions, stf_folder, line, message):
        questions.write_text(questions.read_text() + "\n" + line)
        with pytest.raises(BadInput, match=message):
            self.run(stf_folder, questions)


class TestStudy:
    @pytest.fixture(scope="class")
    def study(self):
        pytest.importorskip("easy_vqa")
        pytest.importorskip("sklearn")
        from bench.quality import study

        return study

    @pytest.fixture(scope="class")
    def folder(self, study, tmp_path_factory):
        folder = tmp_path_factory.mktemp("data")
        study.data.make(folder, boards=12, easy=8, scenes=30, test_boards=20)
        return folder

    def test_answers_are_what_stands_on_the_board(self, study, folder):
        patches, asked = json.loads((folder / "patches.json").read_text()), Counter()
        for question in map(json.loads, (folder / "test.jsonl").open()):
            if question["kind"] not in study.data.DETAIL:
                continue
            board, asked[question["kind"]] = patches[question["image"]][1:], asked[question["kind"]] + 1
            at = [
                board["ABCD".index(name[0]) * 4 + int(name[1]) - 1]
                for name in re.findall(r"\b[A-D]\d", question["text"])
            ]
            if question["kind"] == "digit":
                expected = str(at[0])
            elif question["kind"] == "larger":
                expected = "yes" if at[0] > at[1] else "no"
            else:
                expected = str(board.count(7))
            assert question["answer"] == expected, question
        assert asked == {"digit": 20, "larger": 20, "count": 20}

    def test_scenes_in_words_agree_with_the_answers(self, study):
        for _, scene, turns in study.data.easy_scenes("test"):
            for _, answer, kind in turns:
                if kind in ("colour", "shape") and scene:
                    assert answer in scene.split()

    def test_words_of_the_questions_are_known(self, study, folder):
        tokenizer = study.data.make_processor(folder).tokenizer
        question = "USER: <image>\nWhich digit stands in B3? ASSISTANT: 7 </s>"
        tokens = ["<s>", "user:", "<image>", "which", "digit", "stands", "in", "b3", "assistant:", "7", "</s>"]
        assert tokenizer.convert_ids_to_tokens(tokenizer(question)["input_ids"]) == tokens

    def test_an_interrupted_study_goes_on(self, study, tmp_path, monkeypatch, capsys):
        """Tiny, with every row: the second run trains only what the first did not finish, and the file is whole."""
        monkeypatch.setattr(study, "SMOKE", study.Budget(2, 2, 2, 1, 1, 4, 12, 8, 20, 20))
        monkeypatch.setattr(command, "SMOKE_ROWS", [(row.model, row.start) for row in study.ROWS])
        monkeypatch.setattr(command, "CHANCE", 0.0)
        measure, measured = study.Study.measure, []

        def interrupted(self, row, model, out):
            measured.append(row)
            if len(measured) == 5:
                raise KeyboardInterrupt
            return measure(self, row, model, out)

        monkeypatch.setattr(study.Study, "measure", interrupted)
        arguments = ["--smoke", "--work", str(tmp_path), "--json", str(tmp_path / "quality.json")]
        with pytest.raises(KeyboardInterrupt):
            command.main(arguments)
        result = read(tmp_path / "quality.json")
        assert (len(result["rows"]), result["complete"], result["seeds"]) == (4, False, [])
        assert command.main(arguments) == 0
        assert measured[5:] == study.ROWS[4:]
        result = read(tmp_path / "quality.json")
        assert [row["image_tokens"] for row in result["rows"]] == [16, 4, 4, 4, 4, 16, 4, 4, 1]
        assert (result["complete"], result["seeds"]) == (True, [0])
        assert (tmp_path / "quality.png").stat().st_size > 10000
        assert "STF + MBTF" in capsys.readouterr().out
        monkeypatch.setattr(study, "SMOKE", study.Budget(3))
        with pytest.raises(BadInput, match="holds a study of another budget"):
            command.main(arguments)
        monkeypatch.setattr(study, "SMOKE", study.Budget(2, 2, 2, 1, 1, 4, 12, 8, 20, 20))
        monkeypatch.setattr(command, "CHANCE", 2.0)
        assert command.main(arguments) == 1
