"""Train LLaVA-STF in the two stages of the paper: `python -m llava_integration.train pretrain|finetune ...`.

    pretrain    the projector alone, 1e-3, batches of 256
    finetune    projector and language model, 2e-5, batches of 128
    both        one epoch, cosine after a warm-up of 3 %, no weight decay, the vision tower frozen

The loop is transformers' Trainer: every option of TrainingArguments is an option here, and torchrun, accelerate,
DeepSpeed and FSDP start several processes. A batch is as large whatever their number. OUT is for from_pretrained.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stf_kernels import command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

    from .train_data import Conversations

NAME = "llava_integration.train"
RECIPES = {"pretrain": {"learning_rate": 1e-3, "batch": 256}, "finetune": {"learning_rate": 2e-5, "batch": 128}}
SHARED = {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0}
SHARED |= {"logging_steps": 1, "save_total_limit": 2, "train_sampling_strategy": "group_by_length"}
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
PER_LAYER = 8, 4  # values that backward needs per token and layer: of the hidden, of the intermediate width; about
OPTIONS = ("recipe", "model", "data", "images", "batch", "lora", "from_random", "stock", "blocks", "merge_size")
SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "seed", "lr_scheduler_type", "warmup_steps")


class RunError(ValueError):
    """Options that do not go together, or a folder of another run."""


def train(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    data: "Conversations",
    arguments: "TrainingArguments",
    *,
    recipe: str,
    lora: int | None = None,
    resume: bool = False,
) -> "Trainer":
    """Train a LLaVA-1.5 or LLaVA-STF on `data`, save model and processor at arguments.output_dir -> its Trainer.

    Args:
        recipe: "pretrain" trains the projector, "finetune" the language model too; rates are in `arguments`.
        lora: rank of adapters on the language model, which then stays frozen; merged at the end, kept in `adapter/`.
        resume: go on from the last whole checkpoint in arguments.output_dir, if there is one.
    """
    import functools

    from transformers import Trainer
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from .train_cache import accept_blocks
    from .train_data import Collator

    class GroupingTrainer(Trainer):
        """Lengths with all image tokens; the stock one would open every image to count the ids before it."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.args.train_sampling_strategy != "group_by_length":
                return super()._get_train_sampler(train_dataset)
            whole = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(whole, lengths=data.lengths)

    choose_parameters(model, recipe)
    # Under the names of LLaVA's first checkpoints Trainer would not find the weights again when it resumes.
    model.save_pretrained = functools.partial(type(model).save_pretrained, model, save_original_format=False)
    if data.cache:
        accept_blocks(model)
    collator = Collator(processor, model.config.image_token_id, model.config.image_seq_length)
    if lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=ADAPTED, lora_dropout=0.05)
        adapters.modules_to_save = ["multi_modal_projector"]
        model = get_peft_model(model, adapters)
    arguments.remove_unused_columns = False
    trainer = GroupingTrainer(model, arguments, collator, train_dataset=data, processing_class=processor)
    if trainer.is_world_process_zero():
        print(memory(model, arguments, data.lengths), file=sys.stderr)
        if data.cache and (said := saving(trainer, data)):
            print(said, file=sys.stderr)
    checkpoint = last_checkpoint(Path(arguments.output_dir)) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if lora:
        trainer.save_model(os.path.join(arguments.output_dir, "adapter"))
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    return trainer


def choose_parameters(model: "PreTrainedModel", recipe: str) -> None:
    """requires_grad as `recipe` has it."""
    model.requires_grad_(False)
    parts = [model.model.multi_modal_projector]
    if recipe == "finetune":
        parts += [model.model.language_model, model.lm_head]
    for part in parts:
        part.requires_grad_(True)


def memory(model: "PreTrainedModel", arguments: "TrainingArguments", lengths: Sequence[int]) -> str:
    """What a process will need, and what it has, as a line. Activations are an estimate, for the longest records."""
    import torch
    from psutil import virtual_memory

    text, parameters = model.config.text_config, list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    item = 2 if arguments.bf16 or arguments.fp16 else parameters[0].element_size()
    tokens = sum(sorted(lengths)[-arguments.per_device_train_batch_size :])
    of_hidden, of_intermediate = PER_LAYER if not arguments.gradient_checkpointing else (1, 0)
    layer = of_hidden * text.hidden_size + of_intermediate * text.intermediate_size
    parts = {
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "optimizer": sum(8 * parameter.numel() for parameter in trained),
        "activations": tokens * (text.num_hidden_layers * layer * item + text.vocab_size * (2 * item + 4)),
    }
    gpu = arguments.device.type == "cuda"
    free, need = torch.cuda.mem_get_info()[0] if gpu else virtual_memory().available, sum(parts.values())
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    line = f"memory of a process before sharding, GiB: {listed}; about {need / 2**30:.2f}, {free / 2**30:.2f} free"
    if need > free:
        line += (
            "; too much: a smaller --per_device_train_batch_size, --gradient_checkpointing, --lora, FSDP or DeepSpeed"
        )
    return line


def saving(trainer: "Trainer", data: "Conversations") -> str | None:
    """One step with the tower beside one from the cache, on the first record with an image; None without one."""
    import torch

    from .train_cache import open_image

    index = next((index for index in range(len(data)) if data.files_of(index)), None)
    if index is None:
        return None
    model, taken, cached = trainer.model, [], data[index]
    plain = {**cached, "blocks": [], "images": [open_image(name) for name in data.files_of(index)]}
    with torch.random.fork_rng():
        for item in (plain, cached):
            batch = {name: value.to(model.device) for name, value in trainer.data_collator([item]).items()}
            began = time.perf_counter()
            model(**batch).loss.backward()
            taken.append(time.perf_counter() - began)
    model.zero_grad()
    tower, cache = taken
    return f"a step of one record: {tower:.2f} s with the tower, {cache:.2f} s from the cache, {tower / cache:.1f}x"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: trainer_state.json comes last."""
    found = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        if re.fullmatch(r"checkpoint-\d+", state.parent.name):
            try:
                found[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
            except (ValueError, KeyError):
                continue
    return found[max(found)] if found else None


def load(args: argparse.Namespace) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """--model as LLaVA-STF with its processor: as it is, or warm-started from a LLaVA-1.5."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers import LlavaForConditionalGeneration as Stock

    from . import LlavaStfForConditionalGeneration, LlavaStfProcessor, from_llava

    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype)
        processor = AutoProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise RunError(f"--model: {args.model} cannot be loaded ({str(error).splitlines()[0]})") from None
    if type(model) not in (Stock, LlavaStfForConditionalGeneration):
        raise RunError(f"--model: expected LLaVA-1.5 or LLaVA-STF, got a {type(model).__name__}")
    if type(model) is Stock and not args.stock:
        model = from_llava(model, **{k: v for k in ("blocks", "merge_size") if (v := getattr(args, k)) is not None})
        processor = LlavaStfProcessor.from_llava(processor, merge_size=model.config.spatial_merge_size)
    elif args.blocks or args.merge_size:
        raise RunError(f"--blocks, --merge-size: {args.model} is no LLaVA-1.5 to be converted")
    if args.from_random:
        from_random(model)
    return model, processor


def from_random(model: "PreTrainedModel") -> None:
    """torch's initialisation for every linear layer of the projector, as LLaVA's own projectors begin."""
    for module in model.model.multi_modal_projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def training_arguments(args: argparse.Namespace, others: Sequence[str]) -> "TrainingArguments":
    """The recipe's, overruled by `others`; --batch is reached by accumulating gradients."""
    from transformers import HfArgumentParser, TrainingArguments

    recipe = RECIPES[args.recipe]
    args.batch = args.batch or recipe["batch"]
    given = {"output_dir": args.output, "learning_rate": recipe["learning_rate"], **SHARED}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    usage = f"python -m {NAME} pretrain|finetune [options] [options of transformers.TrainingArguments]"
    parser = HfArgumentParser(TrainingArguments, prog=f"python -m {NAME}", usage=usage, allow_abbrev=False)
    (found,) = parser.parse_args_into_dataclasses([*flags, *others])
    if found.n_gpu > 1:
        raise RunError(
            f"expected one process a GPU, got one for {found.n_gpu}: torchrun --nproc-per-node={found.n_gpu}"
        )
    if "--gradient_accumulation_steps" not in others:
        at_once = found.world_size * found.per_device_train_batch_size
        if args.batch % at_once:
            sizes = (
                f"{found.per_device_train_batch_size} (--per_device_train_batch_size) on {found.world_size} processes"
            )
            raise RunError(f"--batch: expected a multiple of {sizes}, got {args.batch}")
        steps = str(args.batch // at_once)
        (found,) = parser.parse_args_into_dataclasses([*flags, *others, "--gradient_accumulation_steps", steps])
    return found


def check_folder(args: argparse.Namespace, arguments: "TrainingArguments") -> None:
    """Refuse an --output with the checkpoints of another run, or of this one without --resume; say whose it is."""
    from .train_cache import write_whole

    run = {name: str(vars(args)[name]) for name in OPTIONS} | {name: str(getattr(arguments, name)) for name in SETTINGS}
    file = args.output / "run.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if not args.resume:
            raise RunError(f"--output: {args.output} holds a run; go on with --resume, or give a new folder")
        if different := [f"{name} {found.get(name)}, now {run[name]}" for name in run if found.get(name) != run[name]]:
            raise RunError(f"--resume: {args.output} holds a run of other settings: {'; '.join(different)}")
    elif args.output.exists() and any(args.output.iterdir()):
        raise RunError(f"--output: {args.output} is not empty and holds no run; give a new folder")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda path: path.write_text(json.dumps(run, indent=1), encoding="utf-8"))


def parser() -> argparse.ArgumentParser:
    usage = f"python -m {NAME} pretrain|finetune --model DIR --data FILE --output DIR [...]"
    parser = argparse.ArgumentParser(usage=usage, description="Train LLaVA-STF.", allow_abbrev=False)
    parser.epilog = (
        "Every other option is one of transformers.TrainingArguments: --bf16, --max_steps N, --deepspeed FILE..."
    )
    add = parser.add_argument
    add("recipe", choices=sorted(RECIPES), help="pretrain: projector, 1e-3; finetune: and language model, 2e-5")
    add("--model", type=Path, required=True, metavar="DIR", help="LLaVA-STF, or LLaVA-1.5 to be converted")
    add("--data", type=Path, required=True, metavar="FILE", help="LLaVA's JSON: image, conversations")
    add("--images", type=Path, metavar="DIR", help="where image names start; default: the folder of FILE")
    add("--output", type=Path, required=True, metavar="DIR", help="checkpoints, then the trained model")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--batch", type=int, metavar="N", help="records of a step, over all processes; default: the recipe's")
    add("--from-random", action="store_true", help="a random projector instead of the one of --model")
    add("--stock", action="store_true", help="train a LLaVA-1.5 as it is")
    add("--blocks", type=int, nargs="+", metavar="I", help="tower layers of a conversion, deepest first")
    add("--merge-size", type=int, metavar="R", help="side of the window of a conversion")
    add("--lora", type=int, metavar="RANK", help="adapters instead of the whole language model; needs peft")
    add("--cache-features", type=Path, metavar="DIR", help="keep the tower's outputs on disk, run it once an image")
    add("--max-length", type=int, metavar="N", help="tokens of a record; default: what the model takes")
    add("--skip-bad-records", action="store_true", help="leave them out instead of stopping; they are listed")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, others = parser().parse_known_args(argv)
    try:
        return run(args, others)
    except KeyboardInterrupt:
        print(f"\ninterrupted; --resume goes on from the last checkpoint in {args.output}", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, others: Sequence[str]) -> int:
    from transformers import set_seed

    from .train_cache import CacheError, DataError, FeatureCache
    from .train_data import Conversations

    try:
        arguments = training_arguments(args, others)
        if arguments.process_index == 0:  # it writes what the others would find
            check_folder(args, arguments)
        set_seed(arguments.seed)
        model, processor = load(args)
        cache = None
        if args.cache_features:
            with arguments.main_process_first():
                cache = FeatureCache(args.cache_features, model, processor)
            model.model.vision_tower.to(arguments.device)
        data = Conversations(
            args.data,
            args.images or args.data.parent,
            processor,
            max_length=args.max_length or model.config.text_config.max_position_embeddings,
            image_tokens=model.config.image_seq_length,
            need_images=args.recipe == "pretrain",
            skip_bad=args.skip_bad_records,
            cache=cache,
        )
        if cache:
            cache.fill(data.image_files())
        train(model, processor, data, arguments, recipe=args.recipe, lora=args.lora, resume=args.resume)
    except (CacheError, DataError, RunError) as error:
        print(f"python -m {NAME}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        kept = last_checkpoint(args.output)
        print(
            f"python -m {NAME}: error: {error}; {kept or 'no checkpoint'} is whole, --resume goes on", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    command.run(main)
