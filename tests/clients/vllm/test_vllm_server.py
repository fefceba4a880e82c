"""If this fails, vLLM's OpenAI server does not serve LLaVA-STF, or says nothing of a bad request or folder."""

import base64
import io
import json
import shutil

import openai
import psutil
import pytest
from clients.vllm import folders
from support.processes import patient, python

from bench.results import read
from examples.vllm_server import ServerError, serve

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"]
OPTIONS += ["--max-num-batched-tokens", "256", "--limit-mm-per-prompt", '{"image": 2}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.make(tmp_path_factory.mktemp("server") / "model")


@pytest.fixture(scope="module")
def client(folder):
    with serve(folder, *OPTIONS, log=folder.parent / "log") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=patient(60))


def picture(seed):
    file = io.BytesIO()
    folders.images([seed])[0].save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(client, text, pictures):
    """A prompt of PROMPTS as a chat: the words between its images are parts of their own."""
    parts, left = [], list(pictures)
    for piece in text.removeprefix("USER : ").removesuffix(" ASSISTANT :").replace("<image>", "|<image>|").split("|"):
        if piece.strip() == "<image>":
            url = f"data:image/png;base64,{left.pop(0)}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "USER", "content": parts}],
        max_tokens=folders.NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return answer.choices[0].token_ids


def test_greedy_tokens(client, folder):
    """Images as base64: one, two, none."""
    found = [ask(client, text, map(picture, seeds)) for text, seeds in folders.PROMPTS]
    assert found == folders.expected(folder)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([1, 2, 3], "At most 2 image"),
        ([base64.b64encode(b"no image").decode()], "image"),
        ([0], "image"),  # a picture cut short
    ],
)
def test_bad_pictures(client, folder, pictures, message):
    """One sentence, and the next request is answered."""
    sent = [p if isinstance(p, str) else picture(p) for p in pictures]
    if pictures == [0]:
        sent = [sent[0][: len(sent[0]) // 8 * 4]]
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, "USER : " + "<image> " * len(sent) + "what ASSISTANT :", sent)
    text, seeds = folders.PROMPTS[0]
    assert ask(client, text, map(picture, seeds)) == folders.expected(folder)[0]


def test_nothing_is_left_running(folder, tmp_path):
    others = psutil.Process().children(recursive=True)
    with serve(folder, *OPTIONS, log=tmp_path / "log"):
        started = [process for process in psutil.Process().children(recursive=True) if process not in others]
    assert len(started) >= 3  # the server, its engine, a worker
    _, left = psutil.wait_procs(started, timeout=patient(10))  # a killed process takes a moment
    assert not left


def refusal(folder, tmp_path):
    with pytest.raises(ServerError) as error, serve(folder, *OPTIONS, log=tmp_path / "log"):
        pass
    return str(error.value)


def test_a_folder_without_processor_files(folder, tmp_path):
    bare = shutil.copytree(folder, tmp_path / "bare")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (bare / name).unlink(missing_ok=True)
    assert "found no processor_config.json" in refusal(bare, tmp_path)


def test_a_folder_of_another_model_type(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert "expected a LLaVA-STF model, got model_type 'llava'" in refusal(other, tmp_path)


def test_the_benchmark(tmp_path):
    """Both servers at once, its smallest run: what it writes passes the check of result files."""
    file = tmp_path / "serving.json"
    sizes = ["--preset", "small", "--rounds", "1", "--requests", "1", "--concurrency", "1", "--new-tokens", "2"]
    ran = python("-m", "bench.serving", *sizes, "--json", str(file), timeout=400)
    assert ran.returncode == 0, ran.stderr
    result = read(file)
    assert result["complete"]
    stock, stf = result["rows"]
    assert stock["prompt_tokens"] - stf["prompt_tokens"] == 576 - 144
    assert f"{result['ratios']['ttft_ms']['ratio']:.2f}x" in ran.stdout
