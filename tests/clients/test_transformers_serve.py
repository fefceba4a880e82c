"""If this fails, transformers' pipeline or `transformers serve` does not answer from LLaVA-STF as `generate` does."""

import base64
import contextlib
import io
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from conftest import TEMPLATE
from support.processes import ROOT, clean_environment, python
from tiny_llava import make_image, make_model, make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_integration  # noqa: F401

README = (ROOT / "README.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"^\*\*transformers\*\*(.*?)^\*\*", README, re.MULTILINE | re.DOTALL)
(PIPELINE,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
CONVERT, SERVE = re.findall(r"^    (.*)$", SECTION.rpartition("```")[2], re.MULTILINE)
QUESTION = "What is this?"


def answer(folder, tokens):
    """What `generate` says, by hand."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = f"USER: <image> {QUESTION} ASSISTANT:"
    inputs = processor(images=make_image(), text=text, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(made, skip_special_tokens=True)


def test_the_three_lines_of_the_pipeline(folder):
    """In a process of its own; transformers has nothing to say against the model."""
    folder.rename(folder.with_name("llava-stf"))
    code = f"import os; os.chdir({str(folder.parent)!r})\nfrom tiny_llava import make_image\nimage = make_image()\n"
    result = python("-c", code + PIPELINE, PYTHONPATH=f"{ROOT}:{ROOT}/examples")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "not supported" not in result.stderr
    said = result.stdout.strip()
    assert said.endswith(answer(folder.with_name("llava-stf"), 256).strip())
    assert len(said.split()) > 10


@contextlib.contextmanager
def serving(folder, log):
    """The README's command in `folder`, on the CPU and a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *arguments = SERVE.split()
    command = [str(Path(sys.executable).with_name(program)), *arguments, "--device", "cpu", "--port", str(port)]
    environment = clean_environment(HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=1, timeout=60)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_it_converts_and_serves(tmp_path):
    """An image in base64; then one that does not decode, which the server survives."""
    model, processor = make_model(), make_processor()
    model.lm_head.weight.data[:5] = 0
    processor.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "llava-1.5")
    processor.save_pretrained(tmp_path / "llava-1.5")
    python_, *arguments = CONVERT.split()
    assert python_ == "python"
    arguments = [str(tmp_path / word) if word.startswith("llava-") else word for word in arguments]
    converted = python(*arguments)
    assert converted.returncode == 0, converted.stderr
    with serving(tmp_path, tmp_path / "log") as client:

        def ask(picture):
            url = "data:image/png;base64," + base64.b64encode(picture).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
            options = {"model": "./llava-stf", "max_tokens": 4, "temperature": 0}
            return client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)

        file = io.BytesIO()
        make_image().save(file, "PNG")
        expected = answer(tmp_path / "llava-stf", 4)
        assert len(expected.split()) == 4
        assert ask(file.getvalue()).choices[0].message.content == expected
        with pytest.raises(openai.APIError):
            ask(b"no picture")
        assert ask(file.getvalue()).choices[0].message.content == expected
