"""The comparison of arXiv 2506.07138 at a size that two cores train: a LLaVA-1.5 of under a million parameters.

    tower    CLIP, 64x64 pixels, 4x4 patches; trained to say what each patch shows and where it is, then frozen
    text     Llama, trained on the questions with the scene in words
    stage1   stock projector, trained alone on images: the checkpoint that every row starts from
    ROWS     each trained as the paper does, first the projector, then the language model too; same data, same steps

Every part is a folder that a second run finds done. The loop is transformers' Trainer throughout.
"""

import copy
import json
import math
import shutil
import statistics
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, TrainingArguments, set_seed
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from examples import real_questions as data
from llava_integration import LlavaStfConfig, LlavaStfForConditionalGeneration, LlavaStfProcessor, from_llava
from llava_integration.train import from_random, train
from llava_integration.train_cache import FeatureCache, open_image
from llava_integration.train_data import Conversations
from stf_kernels.configs.tables import write_json

from ..command import BadInput
from . import score

CLASSES = 10 + len(data.SCENES), data.SIDE**2  # what a patch or an image shows; where a patch is
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
VISION = transformers.CLIPVisionConfig(**_SIZES, image_size=data.SIDE * data.PIXELS, patch_size=data.PIXELS)


class Budget(NamedTuple):
    """Steps of each part, and the size of the data."""

    tower: int = 3000
    text: int = 2000
    stage1: int = 600
    pretrain: int = 200
    finetune: int = 800
    batch: int = 16
    boards: int = 4000
    easy: int = 3000
    scenes: int = 10000
    test_boards: int = 250


SMOKE = Budget(600, 600, 300, 100, 350, 16, 1500, 500, 6000, 60)


class Row(NamedTuple):
    model: str  # as the table names it
    start: str
    tokens: int
    build: Callable[[nn.Module], nn.Module]
    trained: bool = True


class Pooled(LlavaMultiModalProjector):
    """The stock projector, then the mean of every 2x2 neighbourhood."""

    def forward(self, image_features: Tensor) -> Tensor:
        image = super().forward(image_features).transpose(1, 2).unflatten(2, (data.SIDE, data.SIDE))
        return F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)


def pooled(stock: nn.Module) -> nn.Module:
    stock.model.multi_modal_projector.__class__ = Pooled
    stock.config.image_seq_length = data.SIDE**2 // 4
    return stock


def compact(merge_size: int, *, mbtf: bool = True, random: bool = False) -> Callable[[nn.Module], nn.Module]:
    """LLaVA-STF from a stock model; without MBTF the tokens of the layer that the stock projector reads."""

    def build(stock: nn.Module) -> nn.Module:
        layer = stock.config.vision_feature_layer % (stock.config.vision_config.num_hidden_layers + 1)
        model = from_llava(stock, blocks=None if mbtf else [layer], merge_size=merge_size)
        if not mbtf:
            weights = model.state_dict()
            model = LlavaStfForConditionalGeneration(LlavaStfConfig(**model.config.to_dict() | {"use_mbtf": False}))
            model.load_state_dict({name: value for name, value in weights.items() if ".mbtf." not in name})
        if random:
            from_random(model)
        return model

    return build


ROWS = [
    Row("all tokens", "stage one", 16, lambda stock: stock),
    Row("average pooling", "untrained", 4, compact(2), trained=False),
    Row("average pooling", "stage one", 4, pooled),
    Row("STF", "warm", 4, compact(2, mbtf=False)),
    Row("STF", "random", 4, compact(2, mbtf=False, random=True)),
    Row("MBTF", "warm", 16, compact(1)),
    Row("STF + MBTF", "warm", 4, compact(2)),
    Row("STF + MBTF", "random", 4, compact(2, random=True)),
    Row("STF + MBTF, r = 4", "warm", 1, compact(4)),
]


class Seeing(nn.Module):
    """A tower and what it says of each patch, for its training. Where a patch is, it would forget if nobody asked."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(VISION)
        self.heads = nn.ModuleList(nn.Linear(VISION.hidden_size, classes) for classes in CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen = self.tower(pixel_values).last_hidden_state
        what, where = (head(seen) for head in self.heads)
        places = torch.arange(CLASSES[1]).expand(len(labels), -1)
        losses = F.cross_entropy(what[:, 0], labels[:, 0]), F.cross_entropy(what[:, 1:].mT, labels[:, 1:])
        return {"loss": sum(losses) + F.cross_entropy(where[:, 1:].mT, places)}


class Study:
    """The parts of a study in `folder`, made when they are asked for."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        self.folder, self.budget, settings = folder, budget, folder / "budget.json"
        if settings.exists() and json.loads(settings.read_text()) != budget._asdict():
            raise BadInput(f"--work: {folder} holds a study of another budget; give another folder, or delete it")
        write_json(settings, budget._asdict())
        sizes = budget.boards, budget.easy, budget.scenes, budget.test_boards
        self.data = self.part("data", lambda out: data.make(out, *sizes))
        self.processor, self.read = data.make_processor(self.data), {}

    def arguments(self, out: Path, steps: int, rate: float, seed: int) -> TrainingArguments:
        shown = {"logging_steps": 50, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
        shape = {"per_device_train_batch_size": self.budget.batch, "max_steps": steps, "learning_rate": rate}
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "adam_beta2": 0.98, "seed": seed}
        return TrainingArguments(str(out), **shown, **shape, **schedule, use_cpu=True)

    def part(self, name: str, make: Callable[[Path], None]) -> Path:
        """Folder `name`, made beside its place first."""
        done = self.folder / name
        if not done.exists():
            beside = self.folder / f".{name}.part"
            shutil.rmtree(beside, ignore_errors=True)
            make(beside)
            beside.rename(done)
        return done

    def tower(self, out: Path) -> None:
        labels = json.loads((self.data / "patches.json").read_text(encoding="utf-8"))
        labels = {name: row for name, row in labels.items() if "-train-" in name}

        def collate(names: list[str]) -> dict[str, Tensor]:
            images = [open_image(self.data / "images" / name) for name in names]
            pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([labels[name] for name in names])}

        set_seed(0)
        model, arguments = Seeing(), self.arguments(out, self.budget.tower, 2e-3, 0)
        arguments.remove_unused_columns, arguments.per_device_train_batch_size = False, 32
        transformers.Trainer(model, arguments, collate, train_dataset=sorted(labels)).train()
        model.tower.save_pretrained(out)

    def text(self, out: Path) -> None:
        set_seed(0)
        tokenizer = self.processor.tokenizer
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
        # Wider than the usual 0.02: at this width the model would not start to look things up within its budget.
        sizes |= {"initializer_range": 0.06, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        sizes |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False}
        options = {"vision_config": VISION, "text_config": transformers.LlamaConfig(**sizes)}
        options |= {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": data.SIDE**2}
        model = LlavaForConditionalGeneration(transformers.LlavaConfig(**options))
        embeddings = model.get_input_embeddings().weight.data
        for word, index in tokenizer.get_vocab().items():
            if "=" in word:  # a cell begins as its name and its digit: looking up would take far longer to learn
                name, digit = tokenizer.convert_tokens_to_ids(word.split("="))
                embeddings[index] = embeddings[name] + embeddings[digit]
        records = self.conversations("scenes", model)
        train(model, self.processor, records, self.arguments(out, self.budget.text, 2e-3, 0), recipe="finetune")

    def stage1(self, out: Path) -> None:
        set_seed(0)
        model = LlavaForConditionalGeneration.from_pretrained(self.part("text", self.text))
        tower = CLIPVisionModel.from_pretrained(self.part("tower", self.tower))
        model.model.vision_tower.load_state_dict(tower.state_dict())
        self.conversations("train", from_llava(model), cache=True)  # the layers of every row
        records = self.conversations("train", model, cache=True)
        with torch.no_grad():  # tokens begin as large as words: the language model adds little to much larger ones
            seen = torch.stack([records[index]["blocks"][0][0, 1:] for index in range(16)])
            projector, words = model.model.multi_modal_projector, model.get_input_embeddings().weight
            projector.linear_2.weight.mul_(words.std() / projector(seen).std())
        train(model, self.processor, records, self.arguments(out, self.budget.stage1, 3e-3, 0), recipe="pretrain")

    def conversations(self, name: str, model: nn.Module, *, cache: bool = False) -> Conversations:
        """Records read once; with `cache`, for the layers of `model`."""
        if name not in self.read:
            options = {"max_length": 512, "image_tokens": data.SIDE**2}
            self.read[name] = Conversations(self.data / f"{name}.json", self.data / "images", self.processor, **options)
        records = copy.copy(self.read[name])
        if cache:
            records.cache = FeatureCache(self.folder / "features", model, self.processor)
            records.cache.fill(records.image_files(), batch=64)
        return records

    def row(self, row: Row, seed: int) -> dict[str, Any]:
        """Train a row and ask it the test's questions; what a second run finds done."""
        name = f"{row.model}-{row.start}-{seed if row.trained else 0}".replace(" ", "_")
        done = self.folder / "rows" / f"{name}.json"
        if not done.exists():
            done.parent.mkdir(exist_ok=True)
            stage1 = self.part("stage1", self.stage1)
            set_seed(seed)
            began = time.monotonic()
            model = row.build(LlavaForConditionalGeneration.from_pretrained(stage1))
            if row.trained:
                for recipe in ("pretrain", "finetune"):
                    records = self.conversations("train", model, cache=True)
                    arguments = self.arguments(self.folder / ".training", getattr(self.budget, recipe), 1e-3, seed)
                    train(model, self.processor_of(row), records, arguments, recipe=recipe)
            found = {"seconds": round(time.monotonic() - began)}
            found = self.measure(row, model.eval(), done.with_suffix(".jsonl")) | found
            write_json(done, found)
        return json.loads(done.read_text(encoding="utf-8"))

    def processor_of(self, row: Row) -> LlavaStfProcessor:
        """Which counts the tokens of the row's model."""
        return LlavaStfProcessor.from_llava(self.processor, merge_size=data.SIDE // math.isqrt(row.tokens))

    def measure(self, row: Row, model: nn.Module, out: Path) -> dict[str, Any]:
        """What the result file says of one seed of a row."""
        processor = self.processor_of(row)
        questions = score.read(self.data / "test.jsonl", self.data / "images")
        accuracy = score.score(model, processor, questions, out, batch=64, tokens=2)["exact"]
        for name, kinds in (("detail", data.DETAIL), ("coarse", data.COARSE)):
            accuracy[name] = statistics.mean(accuracy[kind] for kind in kinds)
        image, text = open_image(questions[0]["image"]), f"USER: <image>\n{questions[0]['text']} ASSISTANT:"
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.inference_mode():
            taken = timeit.repeat(lambda: model(**inputs, logits_to_keep=1), repeat=25, number=1)
        parameters = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
        return {"accuracy": accuracy, "prefill_ms": 1e3 * statistics.median(taken), "parameters": parameters}


def summary(row: Row, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the result file, of the seeds that are finished."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}

    kinds = found[0]["accuracy"]
    return {
        "model": row.model,
        "start": row.start,
        "image_tokens": row.tokens,
        "accuracy": {kind: spread([one["accuracy"][kind] for one in found]) for kind in kinds},
        "prefill_ms": statistics.median(one["prefill_ms"] for one in found),
        "parameters": found[0]["parameters"],
        "seeds": len(found),
        "seconds": statistics.mean(one["seconds"] for one in found),
    }
