"""Train LLaVA-STF in the two stages of the paper: `python -m llava_integration.train pretrain|finetune ...`.

    pretrain    the projector alone, 1e-3, batches of 256
    finetune    projector and language model, 2e-5, batches of 128
    both        one epoch, cosine after a warm-up of 3 %, no weight decay, the vision tower frozen

The loop is transformers' Trainer: every option of TrainingArguments is an option here, and torchrun, accelerate,
DeepSpeed and FSDP start several processes. A batch is as large whatever their number. OUT is for from_pretrained.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stf_kernels.command import BadInput, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

    from .train_data import Conversations

NAME = "llava_integration.train"
USAGE = f"python -m {NAME} pretrain|finetune --model DIR --data FILE --output DIR [...]"
RECIPES = {"pretrain": (1e-3, 256), "finetune": (2e-5, 128)}  # learning rate, records of a step
SHARED = {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0}
SHARED |= {"logging_steps": 1, "save_total_limit": 2, "train_sampling_strategy": "group_by_length"}
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
PER_LAYER = 8, 4  # values that backward needs per token and layer: of the hidden, of the intermediate width; about
TILES = "image_grid_pinpoints"  # what the configuration of LLaVA-NeXT and LLaVA-OneVision has
FREE_TO_CHANGE = ("output", "resume", "cache_features", "per_device_train_batch_size")  # of a run that goes on
SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "seed", "lr_scheduler_type", "warmup_steps")


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
    from transformers import Trainer

    from .train_cache import accept_blocks
    from .train_data import ByLength, Collator

    choose_parameters(model, recipe)
    if data.cache:
        accept_blocks(model)
    collator = Collator(processor, model.config.image_token_id, model.config.image_seq_length)
    if lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=ADAPTED, lora_dropout=0.05)
        adapters.modules_to_save = ["multi_modal_projector"]
        model = get_peft_model(model, adapters)
    arguments.remove_unused_columns = False
    trainer = Trainer(model, arguments, collator, train_dataset=data, processing_class=processor)
    if arguments.train_sampling_strategy == "group_by_length":  # Trainer's own would open every image to count ids
        trainer._get_train_sampler = lambda *_: ByLength(trainer, data.lengths)
    if trainer.is_world_process_zero():
        print(memory(model, arguments, data.lengths), file=sys.stderr)
        if data.cache and data.image_files():
            print(saving(trainer, data), file=sys.stderr)
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
    model.model.multi_modal_projector.requires_grad_(True)
    if recipe == "finetune":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)


def memory(model: "PreTrainedModel", arguments: "TrainingArguments", lengths: Sequence[int]) -> str:
    """What a process will need, as a line. Activations are an estimate, for the longest records."""
    text, trained, item = model.config.text_config, model.num_parameters(only_trainable=True), model.dtype.itemsize
    tokens = sum(sorted(lengths)[-arguments.per_device_train_batch_size :])
    of_hidden, of_intermediate = PER_LAYER if not arguments.gradient_checkpointing else (1, 0)
    layer = of_hidden * text.hidden_size + of_intermediate * text.intermediate_size
    computed = 2 if arguments.bf16 or arguments.fp16 else item
    parts = {
        "weights": model.get_memory_footprint(),
        "gradients": trained * item,
        "optimizer": trained * 8,
        "activations": tokens * (text.num_hidden_layers * layer * computed + text.vocab_size * (2 * computed + 4)),
    }
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"memory of a process before sharding, GiB: {listed}; about {sum(parts.values()) / 2**30:.2f}"


def saving(trainer: "Trainer", data: "Conversations") -> str:
    """One step with the tower beside one from the cache, on the first record with an image."""
    import torch

    from .train_cache import open_image

    index = next(index for index in range(len(data)) if data.files_of(index))
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
    whole = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            whole[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
    return whole[max(whole)] if whole else None


def load(args: argparse.Namespace) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """--model with its processor: as it is, or warm-started from a stock LLaVA."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from . import from_llava
    from .core.register import families, family_of

    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype)
        processor = AutoProcessor.from_pretrained(args.model)
        if type(model) not in [family.generator for family in families()]:
            model = from_llava(model)
            kind, r = family_of(model.config).processor, model.config.spatial_merge_size
            processor = kind.from_llava(processor, merge_size=r)
    except (OSError, TypeError, ValueError) as error:
        raise BadInput(f"--model: {args.model} cannot be loaded ({str(error).splitlines()[0]})") from None
    if args.cache_features and hasattr(model.config, TILES):
        raise BadInput(f"--cache-features: expected LLaVA-1.5 or LLaVA-STF, got {type(model).__name__}")
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

    rate, batch = RECIPES[args.recipe]
    args.batch = args.batch or batch
    processes, each = int(os.environ.get("WORLD_SIZE", "1")), args.per_device_train_batch_size
    if args.batch % (processes * each):
        raise BadInput(f"--batch: expected a multiple of {each} for {processes} process(es), got {args.batch}")
    parser = HfArgumentParser(TrainingArguments, prog=f"python -m {NAME}", usage=USAGE, allow_abbrev=False)
    steps = {"per_device_train_batch_size": each, "gradient_accumulation_steps": args.batch // (processes * each)}
    parser.set_defaults(output_dir=str(args.output), learning_rate=rate, **steps, **SHARED)
    (found,) = parser.parse_args_into_dataclasses(list(others))
    if found.n_gpu > 1:
        raise BadInput(f"expected one process a GPU, got one for all: torchrun --nproc-per-node={found.n_gpu}")
    return found


def claim_output(args: argparse.Namespace, arguments: "TrainingArguments") -> None:
    """Refuse an --output with the checkpoints of another run, or of this one without --resume; say whose it is."""
    from .train_cache import write_whole

    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    settings |= {name: str(getattr(arguments, name)) for name in SETTINGS}
    file = args.output / "run.json"
    if args.resume and file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name in settings if found.get(name) != settings[name]]
        if different := [f"{name} {found.get(name)}, now {settings[name]}" for name in other]:
            raise BadInput(f"--resume: {args.output} holds a run of other settings: {'; '.join(different)}")
    elif args.output.exists() and any(not path.name.startswith(".run.json.") for path in args.output.iterdir()):
        raise BadInput(f"--output: {args.output} is not empty; --resume goes on with its run, or give a new folder")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings, indent=1).encode())


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage=USAGE, description="Train LLaVA-STF.", allow_abbrev=False)
    parser.epilog = "[...] are options of transformers.TrainingArguments: --bf16, --max_steps N, --deepspeed FILE, ..."
    add = parser.add_argument
    add("recipe", choices=sorted(RECIPES), help="pretrain: projector, 1e-3; finetune: and language model, 2e-5")
    add("--model", type=Path, required=True, metavar="DIR", help="LLaVA-STF, or a stock LLaVA to be converted")
    add("--data", type=Path, required=True, metavar="FILE", help="LLaVA's JSON: image, conversations")
    add("--images", type=Path, metavar="DIR", help="where image names start; default: the folder of FILE")
    add("--output", type=Path, required=True, metavar="DIR", help="checkpoints, then the trained model")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--batch", type=int, metavar="N", help="records of a step, over all processes; default: the recipe's")
    add("--per_device_train_batch_size", type=int, default=8, metavar="N", help="records at once; default: 8")
    add("--from-random", action="store_true", help="a random projector instead of the one of --model")
    add("--lora", type=int, metavar="RANK", help="adapters instead of the whole language model; needs peft")
    add("--cache-features", type=Path, metavar="DIR", help="keep the tower's outputs on disk, run it once an image")
    add("--skip-bad-records", action="store_true", help="leave them out instead of stopping; they are listed")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, others = parser().parse_known_args(argv)
    from transformers import set_seed

    from .train_cache import FeatureCache
    from .train_data import Conversations, tile_tokens

    try:
        arguments = training_arguments(args, others)
        if arguments.process_index == 0:  # it writes what the others would find
            claim_output(args, arguments)
        set_seed(arguments.seed)
        model, processor = load(args)
        cache = None
        if args.cache_features:
            with arguments.main_process_first():
                cache = FeatureCache(args.cache_features, model, processor)
            model.model.vision_tower.to(arguments.device)
        sizes = {"max_length": model.config.text_config.max_position_embeddings}
        sizes["image_tokens"] = tile_tokens(model) if hasattr(model.config, TILES) else model.config.image_seq_length
        options = {"need_images": args.recipe == "pretrain", "skip_bad": args.skip_bad_records, "cache": cache}
        data = Conversations(args.data, args.images or args.data.parent, processor, **sizes, **options)
        if cache:
            cache.fill(data.image_files())
        train(model, processor, data, arguments, recipe=args.recipe, lora=args.lora, resume=args.resume)
    except OSError as error:
        kept = f"{last_checkpoint(args.output) or 'no checkpoint'} is whole, --resume goes on"
        print(f"python -m {NAME}: error: {error}; {kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; --resume goes on from the last checkpoint in {args.output}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run(main)
