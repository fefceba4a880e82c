"""Fine-tune LLaVA-STF with TRL, as LLaVA is tuned: LoRA on the language model, the projector in full; then merge.

    python examples/trl_lora.py --model FOLDER --data FILE.json --images FOLDER --output_dir OUT [SFTConfig's options]

FILE.json is LLaVA's format, the loss is on the answers; OUT/adapter and OUT/merged are folders for from_pretrained, and
OUT/merged is what vLLM serves. Several processes: `torchrun --nproc-per-node=N` or `accelerate launch` in place of
`python`. Needs trl, peft and datasets; `make test-trl` runs it with a tiny model.

    [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]}]
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

try:
    from datasets import Dataset, Image, List
    from peft import LoraConfig, PeftModel
    from trl import SFTConfig, SFTTrainer, TrlParser
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install trl peft datasets") from None

from llava_integration.clients import check_folder, check_version

ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Data:
    model: str
    data: Path
    images: Path


def examples(data: Data) -> Iterator[dict]:
    """One example an answer: what was said before it, and the answer. TRL puts the images before the first question."""
    for record in json.loads(data.data.read_text(encoding="utf-8")):
        names = record.get("image", [])
        images = [str(data.images / name) for name in ([names] if isinstance(names, str) else names)]
        said = []
        for turn in record["conversations"]:
            message = {"role": ROLES[turn["from"]], "content": turn["value"].replace("<image>", "").strip()}
            if message["role"] == "assistant":
                yield {"images": images, "prompt": list(said), "completion": [message]}
            said.append(message)


def main() -> None:
    data, config = TrlParser((Data, SFTConfig)).parse_args_and_config()
    check_version("trl")
    check_folder(data.model)
    config.max_length = None  # which would cut image tokens off
    config.completion_only_loss = True
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    dataset = Dataset.from_list(list(examples(data))).cast_column("images", List(Image()))
    trainer = SFTTrainer(model=data.model, args=config, train_dataset=dataset, peft_config=lora)
    trainer.train()

    adapter, merged = Path(config.output_dir, "adapter"), Path(config.output_dir, "merged")
    trainer.save_model(str(adapter))
    if trainer.accelerator.is_main_process:
        base = AutoModelForImageTextToText.from_pretrained(data.model)
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(merged)
        AutoProcessor.from_pretrained(data.model).save_pretrained(merged)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {merged} is the whole model")


if __name__ == "__main__":
    main()
