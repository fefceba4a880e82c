"""Small checkpoints in the formats that the converters read, with random values, and what the tests ask about them.

The official format is written from the names and shapes of its tensors; nothing of the converters is used here.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, SiglipVisionModel

import llava_integration as li
from tests.llava import build
from tests.llava.build import randomize

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["USER:", "ASSISTANT:", "what", "is", "in", "the", "picture", "a", "cat", "and", "dog"]
ROWS = 40  # of the embeddings: more than the tokenizer has, not a multiple of 64
C, D = build.VISION["hidden_size"], build.TEXT["hidden_size"]
BLOCKS = [23, 21, 18, 15, 12, 9, 6, 3]

VISION = build.VISION | {"num_hidden_layers": 24, "projection_dim": 16}
TEXT = build.TEXT | {"vocab_size": ROWS, "rms_norm_eps": 1e-05, "bos_token_id": 1, "eos_token_id": 2}


def make_tower(seed: int = 0, **changes) -> CLIPVisionModel:
    torch.manual_seed(seed)
    return randomize(CLIPVisionModel(CLIPVisionConfig(**VISION | changes)))


def make_language(seed: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return randomize(LlamaForCausalLM(LlamaConfig(**TEXT)))


def make_projector(seed: int = 2, blocks: int = len(BLOCKS), window: int = 2, mbtf: bool = True) -> dict[str, Tensor]:
    """Weights of an official projector, in its own names and element order."""
    torch.manual_seed(seed)
    hidden = 4 * window**2 * C
    shapes = {"mm_projector.0": (hidden, window**2 * C), "mm_projector.2": (D, hidden)}
    if mbtf:
        shapes |= {"mm_projector_crosslayer.0": (4 * C, blocks * C), "mm_projector_crosslayer.2": (C, 4 * C)}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"model.{name}.weight"] = torch.randn(rows, columns) / columns**0.5
        tensors[f"model.{name}.bias"] = torch.randn(rows) * 0.1
    return tensors


def tower_tensors(tower: CLIPVisionModel) -> dict[str, Tensor]:
    """`vision_model.*`, the names that CLIP folders and official checkpoints have whatever transformers' are."""
    return {
        "vision_model." + name.removeprefix("vision_model."): value
        for name, value in tower.state_dict().items()
        if not name.endswith("position_ids")
    }


def official_tensors(tower, language, projector) -> dict[str, Tensor]:
    tensors = {**language.state_dict(), **projector}
    if tower is not None:
        tensors |= {"model.vision_tower.vision_tower." + name: value for name, value in tower_tensors(tower).items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def official_config(**changes) -> dict:
    return {
        **TEXT,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": C,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
    } | changes


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1, form: str = "bin") -> None:
    """pytorch_model.bin or model.safetensors, or shards of it with their index."""
    stem, save = ("pytorch_model", torch.save) if form == "bin" else ("model", save_file)
    if shards == 1:
        save(tensors, folder / f"{stem}.{form}")
        return
    weight_map = {}
    for i in range(shards):
        file, part = f"{stem}-{i + 1:05}-of-{shards:05}.{form}", list(tensors)[i::shards]
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{form}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tower(folder: Path, tower: CLIPVisionModel | None = None) -> Path:
    """A CLIP folder: both towers' configuration, and a text tensor that nobody needs."""
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": VISION})
    if tower is not None:
        tensors = {name: value.clone() for name, value in tower_tensors(tower).items()}
        write(folder, tensors | {"text_model.final_layer_norm.weight": torch.ones(4)}, form="safetensors")
    return folder


def make_tokenizer(words: list[str] = SPECIAL + WORDS):
    return build.tokenizer(words)


@functools.cache
def _whole() -> dict[str, Tensor]:
    return official_tensors(make_tower(), make_language(), make_projector())


def whole_tensors() -> dict[str, Tensor]:
    """All tensors of a whole official checkpoint, to change at will."""
    return {name: value.clone() for name, value in _whole().items()}


def make_official(
    folder: Path, shards: int = 2, form: str = "bin", tokenizer: bool = True, tensors: dict | None = None, **config
) -> Path:
    """A whole official checkpoint at `folder`/official, its CLIP without weights at `folder`/tower."""
    src = folder / "official"
    src.mkdir()
    write_tower(folder / "tower")
    write(src, whole_tensors() if tensors is None else tensors, shards, form)
    write_json(src / "config.json", official_config(**config))
    if tokenizer:
        make_tokenizer().save_pretrained(src)
    return src


def make_stock(folder: Path, tokenizer: bool = True, text: dict | None = None, **changes):
    """A LLaVA-1.5 of transformers, saved in `folder`, and the model itself."""
    words = [*SPECIAL, *WORDS, "<image>", "<pad>"]
    text = build.llama(**TEXT | {"vocab_size": 64, "pad_token_id": words.index("<pad>")} | (text or {}))
    model = build.stock(torch.float32, text=text, image_token_index=words.index("<image>"), **changes)
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer(words).save_pretrained(folder)
        write_json(folder / "chat_template.json", {"chat_template": "{{ messages[0]['content'] }}"})
    return model


def in_memory(model, **options):
    """What `from_llava` makes, with the seed of a conversion."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return li.from_llava(model, **options)


def linked(folder: Path, copy: Path) -> Path:
    """`copy`, a folder of links to the files of `folder`."""
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def official_features(
    tower: CLIPVisionModel | SiglipVisionModel,
    projector: dict[str, Tensor],
    pixels: Tensor,
    blocks: list[int] = BLOCKS,
    window: int = 2,
    prefix: int = 1,
) -> Tensor:
    """What the official model computes, by F.unfold and F.linear in float64: [N, 3, S, S] -> [N, tokens, D]."""
    tower = tower.double()
    with torch.no_grad():
        states = tower(pixels.double(), output_hidden_states=True).hidden_states
    x = torch.cat([states[i][:, prefix:] for i in blocks], dim=-1)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, *(projector[f"model.{name}.{part}"].double() for part in ("weight", "bias")))

    if "model.mm_projector_crosslayer.0.weight" in projector:
        x = linear(F.gelu(linear(x, "mm_projector_crosslayer.0")), "mm_projector_crosslayer.2")
    side = int(x.shape[1] ** 0.5)
    image = x.transpose(1, 2).unflatten(2, (side, side))
    merged = F.unfold(image, kernel_size=window, stride=window).transpose(1, 2)  # channel-major
    return linear(F.gelu(linear(merged, "mm_projector.0")), "mm_projector.2")


def make_pixels(images: int = 2) -> Tensor:
    return build.pixels(images, torch.float32)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """`folder` with its tensors changed by `change`, in one file."""
    tensors = whole_tensors()
    change(tensors)
    (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    write(folder, tensors)
