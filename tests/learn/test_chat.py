"""If this fails, the chat does not answer in a terminal, forgets what was said, or dies of a wrong line."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from support.processes import ROOT, clean_environment

from llava_integration import chat
from stf_kernels.command import BadInput
from tests.llava import build


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.end, other = pty.openpty()
        command = [sys.executable, "-m", chat.NAME, *map(str, arguments)]
        options = {"cwd": ROOT, "env": clean_environment(), "close_fds": True, "start_new_session": True}
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, **options)
        os.close(other)
        self.text = ""

    def until(self, pattern, timeout=90):
        """What was written up to a match of `pattern`."""
        until = time.monotonic() + timeout
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < until, self.text
            self.text += os.read(self.end, 4096).decode()
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def say(self, line):
        os.write(self.end, line.encode() + b"\n")

    def close(self):
        code = self.process.wait(timeout=60)
        os.close(self.end)
        return code


SPEED = r"\[(\d+) tokens asked, first answer token after [\d.]+ s, ([\d.]+ tokens/s|one token)\]"


def test_several_turns_and_images_in_a_terminal(stf_folder, tmp_path):
    """The prompt grows by what was said, and by 4 tokens an image; wrong lines are answered."""
    build.image().save(tmp_path / "a.png")
    terminal = Terminal("--model", stf_folder, "--image", tmp_path / "a.png", "--max-new-tokens", "3")
    terminal.until("> ")
    terminal.say("what is in the picture")
    first = int(re.search(SPEED, terminal.until(SPEED)).group(1))
    terminal.say(f"/image {tmp_path / 'none.png'}")
    terminal.until(r"none\.png' cannot be read as an image")
    terminal.say("/nonsense")
    terminal.until("/image FILE, /reset or /quit")
    terminal.say(f"/image {tmp_path / 'a.png'}")
    terminal.until(r"1 image\(s\) for the next question")
    terminal.say("what is in the picture")
    second = int(re.search(SPEED, terminal.until(SPEED)).group(1))
    assert 2 * first <= second <= 2 * first + 4
    terminal.say("/reset")
    terminal.say("what is in")
    assert int(re.search(SPEED, terminal.until(SPEED)).group(1)) < first - 4
    terminal.until("> ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130


def test_a_checkpoint_beside_its_warm_start(stock_folder, tmp_path, monkeypatch, capsys):
    """16 image tokens against 4, and the same question."""
    build.image().save(tmp_path / "a.png")
    monkeypatch.setattr("sys.stdin", io.StringIO("what is in the picture"))
    arguments = ["--model", str(stock_folder), "--image", str(tmp_path / "a.png"), "--compare", "--max-new-tokens", "3"]
    assert chat.main(arguments) == 0
    stock, compact = (int(count) for count, _ in re.findall(SPEED, capsys.readouterr().out))
    assert stock - compact == 12


@pytest.mark.parametrize("after", [0, 3])
def test_an_answer_can_be_stopped(stf_folder, capsys, after):
    """Before its first token and later; the next question is answered, with what was said before."""
    (speaker,) = chat.load(stf_folder, compare=False)
    passes = []

    def interrupted(*_):
        passes.append(1)
        if len(passes) == after + 1:
            raise KeyboardInterrupt

    speaker.model.model.language_model.register_forward_pre_hook(interrupted)
    speaker.model.generation_config.eos_token_id = None
    said = speaker.answer("what is in", [], 300)
    assert len(capsys.readouterr().out.split()) <= after
    assert ("stopped before the first" in said) == (after == 0)
    assert len(speaker.turns[-1]["content"][0]["text"].split()) <= after
    assert [turn["role"] for turn in speaker.turns] == ["user", "assistant"]
    assert "tokens asked" in speaker.answer("what is in", [], 3)


def test_a_question_that_is_too_long_and_one_that_fails(stf_folder, monkeypatch):
    (speaker,) = chat.load(stf_folder, compare=False)
    with pytest.raises(ValueError, match=r"600 of an answer are more than 512; /reset"):
        speaker.answer("what", [], 600)
    monkeypatch.setattr(speaker.model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speaker.answer("what", [], 3)
    assert not speaker.turns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "/nowhere.png"], r"'/nowhere\.png' cannot be read as an image"),
        (["--compare"], "expected a stock .* Llava"),
        (["--model", "/nowhere"], "nowhere"),
    ],
)
def test_bad_input(stf_folder, arguments, message):
    with pytest.raises(BadInput, match=message):
        chat.main(["--model", str(stf_folder), *arguments])
