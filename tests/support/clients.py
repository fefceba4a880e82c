"""What the tests of clients share: the README's lines, a tiny LLaVA-STF folder, and what it is asked."""

import re
from pathlib import Path

from tiny_llava import make_image, make_model, make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_integration as li

from .processes import ROOT

QUESTION = "What is this?"
TEMPLATE = "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
TEMPLATE += "{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
IN_FOLDER = "import os; os.chdir({!r})\nfrom tiny_llava import make_image\nimage = make_image()\n"


def readme(client: str) -> tuple[str, list[str]]:
    """(Python, lines of the shell) that README.md gives for a client."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^\*\*{client}\*\*(.*?)^(?:\*\*|\[)", page, re.MULTILINE | re.DOTALL)
    code = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return "".join(code), re.findall(r"^    (.*)$", section.rpartition("```")[2], re.MULTILINE)


def make_folder(folder: Path, *, stock: bool = False) -> Path:
    """Random, but it answers in words."""
    model, processor = make_model(), make_processor()
    model.lm_head.weight.data[:5] = 0  # the special tokens
    processor.chat_template = TEMPLATE
    if not stock:
        model, processor = li.from_llava(model), li.LlavaStfProcessor.from_llava(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def ask(folder: Path, tokens: int, image=None) -> tuple[str, list[int]]:
    """What `generate` answers to QUESTION, by hand."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image or make_image(), text=f"USER: <image> {QUESTION} ASSISTANT:", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(made, skip_special_tokens=True), made.tolist()
