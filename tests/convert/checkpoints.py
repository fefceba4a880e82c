"""Small checkpoints in the formats that the converters read, with random values, and what the tests ask about them.

The official format is written from the names and shapes of its tensors; nothing of the converters is used here.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionModel,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["USER:", "ASSISTANT:", "what", "is", "in", "the", "picture", "a", "cat", "and", "dog"]
ROWS = 40  # of the embeddings: more than the tokenizer has, not a multiple of 64
C, D, LAYERS, PIXELS, PATCH = 32, 48, 24, 56, 14
GRID = PIXELS // PATCH
BLOCKS = [23, 21, 18, 15, 12, 9, 6, 3]

VISION = {
    "hidden_size": C,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "projection_dim": 16,
}
TEXT = {
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": ROWS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():  # zero biases and unit norms hide mistakes
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return module.eval()


def make_tower(seed: int = 0, **changes) -> CLIPVisionModel:
    torch.manual_seed(seed)
    return randomize(CLIPVisionModel(CLIPVisionConfig(**VISION | changes)))


def make_language(seed: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return randomize(LlamaForCausalLM(LlamaConfig(**TEXT)))


def make_projector(seed: int = 2, blocks: int = len(BLOCKS), window: int = 2, mbtf: bool = True) -> dict[str, Tensor]:
    """Weights of an official projector, in its own names and element order."""
    torch.manual_seed(seed)
    shapes = {"mm_projector.0": (4 * window**2 * C, window**2 * C), "mm_projector.2": (D, 4 * window**2 * C)}
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
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_cache": True,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": C,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "use_mm_proj": True,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
    } | changes


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def write_bin(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """pytorch_model.bin, or shards of it with their index."""
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    _write_shards(folder, tensors, shards, "pytorch_model", "bin", torch.save)


def write_safetensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    _write_shards(folder, tensors, shards, "model", "safetensors", save_file)


def _write_shards(folder, tensors, shards, stem, suffix, save) -> None:
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = names[i::shards]
        file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tower(folder: Path, tower: CLIPVisionModel | None, weights: bool = True) -> Path:
    """A CLIP folder: both towers' configuration, and a text tensor that nobody needs."""
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": VISION | {"image_size": PIXELS}})
    if weights:
        tensors = {name: value.clone() for name, value in tower_tensors(tower).items()}
        write_safetensors(folder, tensors | {"text_model.final_layer_norm.weight": torch.ones(4)})
    return folder


def make_tokenizer(words: list[str] = SPECIAL + WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


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
    write_tower(folder / "tower", None, weights=False)
    write = {"bin": write_bin, "safetensors": write_safetensors}[form]
    write(src, whole_tensors() if tensors is None else tensors, shards)
    write_json(src / "config.json", official_config(**config))
    if tokenizer:
        make_tokenizer().save_pretrained(src)
    return src


def make_stock(
    folder: Path, text: dict | None = None, tokenizer: bool = True, **changes
) -> LlavaForConditionalGeneration:
    """A LLaVA-1.5 of transformers, saved in `folder`."""
    torch.manual_seed(4)
    text = TEXT | {"vocab_size": 64, "pad_token_id": 15} | (text or {})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION | {"num_hidden_layers": 6}),
        text_config=LlamaConfig(**text),
        image_token_index=14,
        image_seq_length=GRID**2,
        **changes,
    )
    model = randomize(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    if tokenizer:
        made = make_tokenizer([*SPECIAL, *WORDS, "<image>", "<pad>"])
        made.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
        made.save_pretrained(folder)
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}"}))
    return model


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
    w = {name.removeprefix("model."): value.double() for name, value in projector.items()}
    x = torch.cat([states[i][:, prefix:] for i in blocks], dim=-1)
    if "mm_projector_crosslayer.0.weight" in w:
        x = F.gelu(F.linear(x, w["mm_projector_crosslayer.0.weight"], w["mm_projector_crosslayer.0.bias"]))
        x = F.linear(x, w["mm_projector_crosslayer.2.weight"], w["mm_projector_crosslayer.2.bias"])
    n, tokens, channels = x.shape
    side = int(tokens**0.5)
    image = x.transpose(1, 2).reshape(n, channels, side, side)
    merged = F.unfold(image, kernel_size=window, stride=window).transpose(1, 2)  # channel-major
    h = F.gelu(F.linear(merged, w["mm_projector.0.weight"], w["mm_projector.0.bias"]))
    return F.linear(h, w["mm_projector.2.weight"], w["mm_projector.2.bias"])


def make_pixels(images: int = 2) -> Tensor:
    return torch.randn(images, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(3))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """`folder` with its tensors changed by `change`, in one file."""
    tensors = whole_tensors()
    change(tensors)
    (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    write_bin(folder, tensors)
