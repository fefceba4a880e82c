"""Time to first token of vLLM's server: LLaVA-1.5 against LLaVA-STF, same prompts, same number of requests at once.

Both servers run; a round sends its requests to one and then to the other, the first in turns. The time is the client's:
from sending a prompt to the first token of the stream. Every request has words and a picture of its own, and vLLM keeps
no prefix: nothing is answered from a cache. Exit codes: 0 measured, 1 a server or a request failed, 2 bad input, 130
interrupted (the file keeps the rounds that were measured, as incomplete).
"""

import argparse
import asyncio
import base64
import contextlib
import io
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from examples.vllm_server import ServerError, serve

from . import command
from .command import number
from .prefill.__main__ import PHOTOGRAPH
from .prefill.presets import preset

MODELS = ("llava-1.5", "llava-stf")
TEXT = "the this that is are in on of sky tower light cloud day night red blue white near far up"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
)
# title of the column, its digits, what is better of LLaVA-STF's
COLUMNS = {
    "ttft_ms": ("first token ms", 0, "First token sooner"),
    "requests_per_s": ("requests/s", 2, "requests per second"),
}
OPTIONS = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 1}']
ON_GPU = ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.44"]  # two servers
ON_CPU = ["--dtype", "float32", "--enforce-eager"]  # 16 bit is emulated on many, and vLLM compiles for a minute


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description="LLaVA-1.5 against LLaVA-STF in vLLM.")
    add, count = parser.add_argument, {"type": command.positive(int), "metavar": "N"}
    add("--preset", choices=("13b", "7b", "cpu", "small"), help="random weights; default: 7b with a GPU, else small")
    add("--model", type=command.model_folder, metavar="FOLDER", help="a LLaVA-1.5 checkpoint, together with --stf")
    add("--stf", type=command.model_folder, metavar="FOLDER", help="the LLaVA-STF checkpoint made of it")
    add("--concurrency", **count, default=4, help="requests at once, default 4")
    add("--requests", **count, default=8, help="requests of a round, default 8")
    add("--words", **count, default=40, help="words of a prompt, default 40")
    add("--new-tokens", **count, default=8, help="tokens of an answer, default 8")
    add("--rounds", **count, default=4, help="default 4")
    add("--json", type=command.writable_file, metavar="FILE", help="default: .work/results/<device>/serving.json")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.stf) or (args.model and args.preset):
        parser.error("argument --model: give --model and --stf together, and no --preset with them")
    if not find_spec("vllm"):
        parser.error("vLLM is not installed: make .venv-vllm/.installed, then .venv-vllm/bin/python -m bench.serving")
    return args


def make_folders(name: str, where: Path) -> list[Path]:
    """Configuration and processor of both models, of one tokenizer; vLLM makes the weights (--load-format dummy)."""
    from examples.tiny_llava import make_processor
    from llava_integration import LlavaStfConfig, LlavaStfProcessor

    config = preset(name).config
    vision, text, token = config.vision_config, config.text_config, config.image_token_id
    words = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    words += [f"w{i}" for i in range(len(words), text.vocab_size)]
    words[token] = "<image>"
    stock = make_processor(words, vision.image_size, vision.patch_size)
    stock.chat_template = TEMPLATE
    stf = LlavaStfConfig(vision_config=vision, text_config=text, image_token_id=token)
    pairs = (config, stock, "Llava"), (stf, LlavaStfProcessor.from_llava(stock), "LlavaStf")
    for model, (described, processor, kind) in zip(MODELS, pairs, strict=True):
        described.architectures = [f"{kind}ForConditionalGeneration"]
        described.save_pretrained(where / model)
        processor.save_pretrained(where / model)
    return [where / model for model in MODELS]


def picture(seed: int) -> str:
    """The photograph turned a little, a data URL."""
    from PIL import Image, ImageChops

    with Image.open(PHOTOGRAPH) as photograph:
        across, down = seed % photograph.width, seed // photograph.width
        moved, file = ImageChops.offset(photograph.convert("RGB"), across, down), io.BytesIO()
    moved.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def prompts(seed: int, count: int, words: int) -> list[list[dict[str, Any]]]:
    found = []
    for index in range(count):
        text = " ".join(random.Random(1000 * seed + index).choices(WORDS, k=words))
        picture_part = {"type": "image_url", "image_url": {"url": picture(count * seed + index)}}
        found.append([{"role": "user", "content": [picture_part, {"type": "text", "text": text}]}])
    return found


async def send(url: str, messages: list[list[dict[str, Any]]], concurrency: int, tokens: int) -> dict[str, Any]:
    """All of them, `concurrency` at once: as soon as one is answered the next is sent."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        options = {"model": (await client.models.list()).data[0].id, "max_tokens": tokens, "temperature": 0}
        options |= {"stream": True, "stream_options": {"include_usage": True}}
        options |= {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
        free = asyncio.Semaphore(concurrency)

        async def first_token(message: list[dict[str, Any]]) -> tuple[float, int]:
            """Milliseconds to the first token of the stream, and the prompt's tokens as the server counts them."""
            async with free:
                start, first, counted = time.perf_counter(), None, 0
                async for chunk in await client.chat.completions.create(messages=message, **options):
                    # The chunk that only says who speaks has no token.
                    if first is None and chunk.choices and getattr(chunk.choices[0], "token_ids", None):
                        first = 1e3 * (time.perf_counter() - start)
                    counted = chunk.usage.prompt_tokens if chunk.usage else counted
                return first, counted

        start = time.perf_counter()
        answers = await asyncio.gather(*map(first_token, messages))
        rate = len(messages) / (time.perf_counter() - start)
    return {"ttft_ms": [first for first, _ in answers], "requests_per_s": rate, "prompt_tokens": answers[0][1]}


def rows_of(rounds: list[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each model, and how many times better the second one is, round by round."""
    from .stats import paired_ratio

    rows = []
    for model, own in zip(MODELS, zip(*rounds, strict=True), strict=True):
        samples = {
            "ttft_ms": [median(found["ttft_ms"]) for found in own],
            "requests_per_s": [found["requests_per_s"] for found in own],
        }
        row = {"model": model, "prompt_tokens": own[0]["prompt_tokens"], "rounds": len(own)}
        rows.append(row | {name: median(values) for name, values in samples.items()} | {"samples": samples})
    one, other = (row["samples"] for row in rows)
    rate = paired_ratio(other["requests_per_s"], one["requests_per_s"])
    return rows, {"ttft_ms": paired_ratio(one["ttft_ms"], other["ttft_ms"]), "requests_per_s": rate}


def cells(result: dict[str, Any]) -> list[dict[str, str]]:
    """Column -> what it says, for every row."""
    found = []
    for row in result["rows"]:
        found.append({"model": row["model"], "prompt tokens": str(row["prompt_tokens"])})
        for name, (title, digits, _) in COLUMNS.items():
            least, most = (number(end(row["samples"][name]), digits) for end in (min, max))
            found[-1] |= {title: number(row[name], digits), f"{title}, rounds": f"{least} to {most}"}
    return found


def sentences(result: dict[str, Any]) -> list[str]:
    """How many times better LLaVA-STF is."""
    spread = "{}: {ratio:.2f}x ({low:.2f} to {high:.2f}, p10 to p90 of {} paired rounds)"
    rounds = result["rows"][0]["rounds"]
    return [spread.format(what, rounds, **result["ratios"][name]) for name, (_, _, what) in COLUMNS.items()]


def report(result: dict[str, Any]) -> str:
    head = "{device}   {dtype}, vLLM {vllm}, torch {torch}, transformers {transformers}, commit {commit:.12}\n"
    head += "{preset}, {concurrency} requests at once, {requests} a round, {new_tokens} tokens each, median of rounds\n"
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join([head.format(**result), command.table(cells(result)), "", *sentences(result), *notes])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch
    import vllm
    from openai import OpenAIError

    from . import results

    device, size, own = ("cuda", "7b", ON_GPU) if torch.cuda.is_available() else ("cpu", "small", ON_CPU)
    name = str(args.model or args.preset or size)
    path = args.json or results.results_folder(device) / "serving.json"
    options = [*OPTIONS, *own, *([] if args.model else ["--load-format", "dummy"])]
    result = {**results.describe("serving", device), "vllm": vllm.__version__, "preset": name, "dtype": own[1]}
    if device == "cpu":
        result["notes"].append("each worker of vLLM computes on all cores but one, which it leaves to the server")
    result |= {key: getattr(args, key) for key in ("concurrency", "requests", "words", "new_tokens")}
    logs = [path.with_name(f"serving-{model}.log") for model in MODELS]
    path.parent.mkdir(parents=True, exist_ok=True)
    rounds: list[list[dict[str, Any]]] = []
    try:
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stf-serving-")))
            folders = [args.model, args.stf] if args.model else make_folders(name, work)
            begin = stack.enter_context(command.progress(2 + args.rounds))
            starting = [serve(folder, *options, log=log) for folder, log in zip(folders, logs, strict=True)]
            begin("starting both servers")
            # On a GPU one by one: each measures how much memory is free.
            with ThreadPoolExecutor(1 if device == "cuda" else 2) as pool:
                urls = list(pool.map(stack.enter_context, starting))
            for index in range(1 + args.rounds):
                begin(f"round {index} of {args.rounds}" if index else "warming up")
                sent, found = prompts(index, args.requests if index else args.concurrency, args.words), {}
                for model, url in list(zip(MODELS, urls, strict=True))[:: 1 if index % 2 else -1]:
                    found[model] = asyncio.run(send(url, sent, args.concurrency, args.new_tokens))
                if index:
                    rounds.append([found[model] for model in MODELS])
                    result["rows"], result["ratios"] = rows_of(rounds)
                    results.write(path, result | {"complete": index == args.rounds})
    except (ServerError, OpenAIError) as error:
        print(f"error: {error} (what the servers wrote: {logs[0]}, {logs[1]})", file=sys.stderr)
        return 1
    print(f"{report(result)}\n\n{path}")
    return 0


if __name__ == "__main__":
    command.run(main)
