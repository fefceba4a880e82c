"""If this fails, transformers' pipeline or `transformers serve` does not answer from LLaVA-STF as `generate` does."""

import base64
import contextlib
import io
import shlex
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
from support.clients import IN_FOLDER, QUESTION, ask, make_folder, readme
from support.processes import ROOT, clean_environment, patient, python
from tiny_llava import make_image

PIPELINE, (CONVERT, SERVE) = readme("transformers")
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
(SERVE_PLAIN,) = [line.strip() for line in PAGE.splitlines() if line.endswith("main()' serve ./llava-stf")]


def test_the_three_lines_of_the_pipeline(folder):
    """In a process of its own; transformers has nothing to say against the model."""
    code = IN_FOLDER.format(str(folder.parent)) + PIPELINE
    result = python("-c", code, PYTHONPATH=f"{ROOT}:{ROOT}/examples")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "not supported" not in result.stderr
    said = result.stdout.strip()
    assert said.endswith(ask(folder, 256)[0].strip())
    assert len(said.split()) > 10


@contextlib.contextmanager
def serving(folder, command):
    """`command` in `folder`, on the CPU and a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *arguments = shlex.split(command)
    command = [str(Path(sys.executable).with_name(program)), *arguments, "--device", "cpu", "--port", str(port)]
    environment = clean_environment(HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + patient(120)
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=1, timeout=patient(60))
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(patient(30))


@pytest.mark.parametrize("plain", [False, True], ids=["auto_map", "plain"])
def test_it_converts_and_serves(tmp_path, plain):
    """An image in base64; then one that does not decode, which the server survives."""
    make_folder(tmp_path / "llava-1.5", stock=True)
    python_, *arguments = (CONVERT.removesuffix(" --auto-map") if plain else CONVERT).split()
    assert python_ == "python"
    arguments = [str(tmp_path / word) if word.startswith("llava-") else word for word in arguments]
    converted = python(*arguments)
    assert converted.returncode == 0, converted.stderr
    with serving(tmp_path, SERVE_PLAIN if plain else SERVE) as client:

        def served(picture):
            url = "data:image/png;base64," + base64.b64encode(picture).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
            options = {"model": "./llava-stf", "max_tokens": 4, "temperature": 0}
            return client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)

        file = io.BytesIO()
        make_image().save(file, "PNG")
        expected, _ = ask(tmp_path / "llava-stf", 4)
        assert len(expected.split()) == 4
        assert served(file.getvalue()).choices[0].message.content == expected
        with pytest.raises(openai.APIError):
            served(b"no picture")
        assert served(file.getvalue()).choices[0].message.content == expected
