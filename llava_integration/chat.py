"""Talk to a LLaVA or LLaVA-STF in a terminal: `python -m llava_integration.chat --model DIR [--image FILE ...]`.

A line is a question. /image FILE shows an image with the next one, /reset forgets everything, /quit or Ctrl-D ends;
Ctrl-C stops an answer. --compare asks a stock LLaVA and its untrained LLaVA-STF, which averages its image tokens.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stf_kernels.command import BadInput, carry_on, run

NAME = "llava_integration.chat"


class Speaker:
    """A model, its processor and the conversation so far, with all images in order."""

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model.eval(), processor
        self.turns: list[dict[str, Any]] = []
        self.images: list[Any] = []

    def answer(self, question: str, images: Sequence[Any], tokens: int) -> str:
        """Write the answer to stdout as it comes -> a line on its speed. ValueError for a prompt that is too long."""
        from transformers import TextStreamer

        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        turns, seen = [*self.turns, {"role": "user", "content": content}], [*self.images, *images]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(images=seen or None, text=prompt, return_tensors="pt").to(self.model.device)
        length, most = inputs.input_ids.shape[1], self.model.config.text_config.max_position_embeddings
        if length + tokens > most:
            raise ValueError(f"{length} tokens of conversation and {tokens} of an answer are more than {most}; /reset")
        ids, times = [inputs.input_ids], []

        def tick(made: Any, _scores: Any) -> bool:
            ids.append(made)
            times.append(time.monotonic())
            return False

        options = {"max_new_tokens": tokens, "do_sample": False, "stopping_criteria": [tick]}
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        began = time.monotonic()
        try:
            self.model.generate(**inputs, **options, streamer=streamer)
        except KeyboardInterrupt:
            carry_on()
            streamer.end()
        said = self.processor.decode(ids[-1][0, length:], skip_special_tokens=True).strip()
        self.turns, self.images = [*turns, {"role": "assistant", "content": [{"type": "text", "text": said}]}], seen
        if not times:
            return f"[{length} tokens asked, stopped before the first answer token]"
        rate = f"{(len(times) - 1) / max(times[-1] - times[0], 1e-9):.1f} tokens/s" if len(times) > 1 else "one token"
        return f"[{length} tokens asked, first answer token after {times[0] - began:.2f} s, {rate}]"


def load(folder: Path, compare: bool) -> list[Speaker]:
    """The model of `folder`; with `compare` also its warm start, which shares its weights."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from . import from_llava
    from .core.register import family_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    processor = AutoProcessor.from_pretrained(folder)
    speakers = [Speaker(model.config.model_type, model, processor)]
    if compare:
        compact = from_llava(model)
        merged = family_of(compact.config).processor.from_llava(processor, merge_size=compact.config.spatial_merge_size)
        speakers.append(Speaker(f"{compact.config.model_type}, untrained", compact, merged))
    return speakers


def show(path: str) -> Any:
    """A decoded image; ValueError for what is none."""
    from .images import picture

    try:
        return picture(Path(path).expanduser())
    except Exception as error:  # codecs raise what they like
        raise ValueError(f"{path!r} cannot be read as an image ({error})") from None


def converse(speakers: Sequence[Speaker], images: list[Any], tokens: int) -> None:
    """Lines from stdin until /quit or its end."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/image":
                images.append(show(rest.strip()))
                print(f"[{len(images)} image(s) for the next question]")
            elif command == "/reset":
                images = []
                for speaker in speakers:
                    speaker.turns, speaker.images = [], []
            elif line.startswith("/"):
                print("[/image FILE, /reset or /quit]")
            elif line:
                for speaker in speakers:
                    if len(speakers) > 1:
                        print(f"{speaker.name}: ", end="")
                    print(speaker.answer(line, images, tokens))
                images = []
        except ValueError as error:
            print(f"[{error}]")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description="Talk to a LLaVA or LLaVA-STF.")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint with its processor")
    add("--image", nargs="+", default=[], metavar="FILE", help="for the first question; /image FILE later")
    add("--compare", action="store_true", help="a stock LLaVA beside its untrained LLaVA-STF")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, default 512")
    args = parser.parse_args(argv)
    try:
        images = [show(path) for path in args.image]
        converse(load(args.model, args.compare), images, args.max_new_tokens)
    except (OSError, TypeError, ValueError) as error:
        raise BadInput(str(error).splitlines()[0]) from error
    return 0


if __name__ == "__main__":
    run(main)
