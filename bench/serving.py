"""Time to first token of vLLM's server: LLaVA-1.5 against LLaVA-STF, same prompts, same number of requests at once.

Both servers run; a round sends its requests to one and then to the other, the first in turns, so that drift of the
machine cancels. The time is the client's: from sending a prompt with its picture to the first token of the stream.
Every request has words and a picture of its own, and vLLM keeps no prefix: nothing is answered from a cache.
Exit codes: 0 measured, 1 a server or a request failed, 2 bad input, 130 interrupted (the file keeps
the rounds that were measured, as incomplete).
"""

import argparse
import asyncio
import base64
import contextlib
import io
import random
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from . import command
from .command import number, positive_int
from .prefill.__main__ import PHOTOGRAPH
from .prefill.presets import SIZES, preset

NAME = "bench.serving"
MODELS = ("llava-1.5", "llava-stf")
TEXT = "the this that is are in on of sky tower light cloud day night red blue white near far up"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
)
COLUMNS = {"ttft_ms": ("first token ms", 0), "ttft_p90_ms": ("p90 ms", 0), "requests_per_s": ("requests/s", 2)}
OPTIONS = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 1}']
ON_GPU = ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.44"]  # two servers
ON_CPU = ["--dtype", "float32", "--enforce-eager"]  # 16 bit is emulated on many, and vLLM compiles for a minute


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="LLaVA-1.5 against LLaVA-STF in vLLM.")
    add = parser.add_argument
    add("--preset", choices=sorted(SIZES.keys() - {"tiny"}), help="random weights; default: 7b with a GPU, else small")
    add("--model", type=Path, metavar="FOLDER", help="a LLaVA-1.5 checkpoint, together with --stf")
    add("--stf", type=Path, metavar="FOLDER", help="the LLaVA-STF checkpoint made of it")
    add("--concurrency", type=positive_int, default=4, metavar="N", help="requests at once, default 4")
    add("--requests", type=positive_int, default=8, metavar="N", help="requests of a round, default 8")
    add("--words", type=positive_int, default=40, metavar="N", help="words of a prompt, default 40")
    add("--new-tokens", type=positive_int, default=8, metavar="N", help="tokens of an answer, default 8")
    add("--rounds", type=positive_int, default=4, metavar="N", help="default 4")
    add("--json", type=command.writable_file, metavar="FILE", help="default: .work/results/<device>/serving.json")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.stf) or (args.model and args.preset):
        parser.error("argument --model: give --model and --stf together, and no --preset with them")
    for name in ("model", "stf"):
        if (folder := getattr(args, name)) and not (folder / "config.json").is_file():
            parser.error(f"argument --{name}: {str(folder)!r} has no config.json")
    if not find_spec("vllm"):
        parser.error("vLLM is not installed: make .venv-vllm/.installed, then .venv-vllm/bin/python -m bench.serving")
    return args


def make_folders(name: str, where: Path) -> list[Path]:
    """Configuration and processor of both models, of one tokenizer; vLLM makes the weights (--load-format dummy)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    from llava_integration import LlavaStfConfig, LlavaStfProcessor

    config = preset(name).config
    vision, text = config.vision_config, config.text_config
    image = config.image_token_id
    words = ["<unk>", "<s>", "</s>", *WORDS, *(f"w{i}" for i in range(3 + len(WORDS), text.vocab_size))]
    words[image] = "<image>"
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    size = vision.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    options = {"patch_size": vision.patch_size, "chat_template": TEMPLATE}
    stock = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    parts = {"vision_config": vision, "text_config": text, "image_token_id": image}
    pairs = (
        (config, LlavaProcessor(images, tokenizer, **stock, **options), "LlavaForConditionalGeneration"),
        (LlavaStfConfig(**parts), LlavaStfProcessor(images, tokenizer, **options), "LlavaStfForConditionalGeneration"),
    )
    for model, (described, processor, architecture) in zip(MODELS, pairs, strict=True):
        described.architectures = [architecture]
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
        chosen = random.Random(1000 * seed + index)
        text = {"type": "text", "text": " ".join(chosen.choices(WORDS, k=words))}
        url = {"url": picture(count * seed + index)}
        found.append([{"role": "user", "content": [{"type": "image_url", "image_url": url}, text]}])
    return found


async def first_token(client: Any, model: str, messages: list[dict[str, Any]], tokens: int) -> tuple[float, int]:
    """Seconds to the first token of the stream, and the prompt's tokens as the server counts them."""
    start, first, counted = time.perf_counter(), None, 0
    stream = await client.chat.completions.create(
        model=model,
        messages=messages,
        stream=True,
        max_tokens=tokens,
        temperature=0,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in stream:
        # The chunk that only says who speaks has none.
        if first is None and chunk.choices and getattr(chunk.choices[0], "token_ids", None):
            first = time.perf_counter() - start
        counted = chunk.usage.prompt_tokens if chunk.usage else counted
    return first, counted


async def send(url: str, messages: list[list[dict[str, Any]]], concurrency: int, tokens: int) -> dict[str, Any]:
    """All of them, `concurrency` at once: as soon as one is answered the next is sent."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        free = asyncio.Semaphore(concurrency)

        async def one(message: list[dict[str, Any]]) -> tuple[float, int]:
            async with free:
                return await first_token(client, model, message, tokens)

        start = time.perf_counter()
        answers = await asyncio.gather(*map(one, messages))
        seconds = time.perf_counter() - start
    return {
        "ttft_ms": [1e3 * first for first, _ in answers],
        "requests_per_s": len(messages) / seconds,
        "prompt_tokens": answers[0][1],
    }


def rows_of(rounds: list[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each model, and how many times better the second one is, round by round."""
    from .stats import low_high, paired_ratio

    rows = []
    for model, own in zip(MODELS, zip(*rounds, strict=True), strict=True):
        samples = {
            "ttft_ms": [median(found["ttft_ms"]) for found in own],
            "ttft_p90_ms": [low_high(found["ttft_ms"])[1] for found in own],
            "requests_per_s": [found["requests_per_s"] for found in own],
        }
        row = {"model": model, "prompt_tokens": own[0]["prompt_tokens"], "rounds": len(own)}
        rows.append(row | {name: median(values) for name, values in samples.items()} | {"samples": samples})
    one, other = (row["samples"] for row in rows)
    ratios = {name: paired_ratio(one[name], other[name]) for name in ("ttft_ms", "ttft_p90_ms")}
    return rows, ratios | {"requests_per_s": paired_ratio(other["requests_per_s"], one["requests_per_s"])}


def cells(result: dict[str, Any]) -> list[dict[str, str]]:
    """Column -> what it says, for every row."""
    found = []
    for row in result["rows"]:
        found.append({"model": row["model"], "prompt tokens": str(row["prompt_tokens"])})
        for name, (title, digits) in COLUMNS.items():
            ends = (number(end(row["samples"][name]), digits) for end in (min, max))
            found[-1] |= {title: number(row[name], digits), f"{title}, rounds": " to ".join(ends)}
    return found


def sentences(result: dict[str, Any]) -> list[str]:
    """How many times better LLaVA-STF is."""
    what = {"ttft_ms": "First token sooner", "ttft_p90_ms": "its p90 sooner", "requests_per_s": "requests per second"}
    spread = "{what}: {ratio:.2f}x ({low:.2f} to {high:.2f}, p10 to p90 of {rounds} paired rounds)"
    rounds = result["rows"][0]["rounds"]
    return [spread.format(what=what[name], rounds=rounds, **ratio) for name, ratio in result["ratios"].items()]


def report(result: dict[str, Any]) -> str:
    where = "{device}   {dtype}, vLLM {vllm}, torch {torch}, transformers {transformers}, commit {commit:.12}"
    what = "{preset}, {concurrency} requests at once, {requests} a round, {new_tokens} tokens each, medians of rounds"
    shown, notes = cells(result), [f"note: {note}" for note in result["notes"]]
    drawn = command.table(list(shown[0]), [list(row.values()) for row in shown])
    return "\n".join([where.format(**result), what.format(**result), "", drawn, "", *sentences(result), *notes])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end with this process
    import torch
    import vllm
    from openai import OpenAIError

    from . import results
    from .server import ServerError, serve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(args.model) if args.model else args.preset or ("7b" if device == "cuda" else "small")
    path = args.json or results.results_folder(device) / "serving.json"
    options = [*OPTIONS, *(ON_GPU if device == "cuda" else ON_CPU), *([] if args.model else ["--load-format", "dummy"])]
    result = {**results.describe("serving", device), "vllm": vllm.__version__, "preset": name}
    if device == "cpu":
        result["notes"].append("each worker of vLLM computes on all cores but one, which it leaves to the server")
    result["dtype"] = options[options.index("--dtype") + 1]
    result |= {key: getattr(args, key) for key in ("concurrency", "requests", "words", "new_tokens")}
    logs = [path.with_name(f"serving-{model}.log") for model in MODELS]
    path.parent.mkdir(parents=True, exist_ok=True)
    rounds: list[list[dict[str, Any]]] = []
    try:
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stf-serving-")))
            folders = [args.model, args.stf] if args.model else make_folders(name, work)
            progress = stack.enter_context(command.Progress(2 + args.rounds))
            starting = [serve(folder, *options, log=log) for folder, log in zip(folders, logs, strict=True)]
            progress.step("starting both servers")
            # On a GPU one by one: each measures how much memory is free.
            with ThreadPoolExecutor(1 if device == "cuda" else 2) as pool:
                urls = list(pool.map(stack.enter_context, starting))
            for index in range(1 + args.rounds):
                progress.step(f"round {index} of {args.rounds}" if index else "warming up")
                sent, found = prompts(index, args.requests if index else args.concurrency, args.words), {}
                for model, url in list(zip(MODELS, urls, strict=True))[:: 1 if index % 2 else -1]:
                    found[model] = asyncio.run(send(url, sent, args.concurrency, args.new_tokens))
                rounds += [[found[model] for model in MODELS]] * bool(index)
    except (ServerError, OpenAIError) as error:
        where = ", ".join(str(log) for log in logs)
        print(f"python -m {NAME}: error: {error} (what the servers wrote: {where})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted after {len(rounds)} rounds", file=sys.stderr)
    if rounds:
        result["rows"], result["ratios"] = rows_of(rounds)
        result["complete"] = len(rounds) == args.rounds
        results.write(path, result)
        print(f"{report(result)}\n\n{path}")
    return 0 if result["complete"] else 130


if __name__ == "__main__":
    command.run(main)
