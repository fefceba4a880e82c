"""Peak anonymous memory of converting a 7B-sized checkpoint: python tests/convert/measure_memory.py DIR [--keep].

Writes random bf16 checkpoints of the 7B sizes under DIR, in shards as they are published (10 GB `.bin` for `official`,
5 GB safetensors for `llava`), converts each in a process of its own and samples RssAnon of that process every 5 ms.
Needs 28 GB of disk: 14 for one source, 14 for what is made of it; both go before the next. Prints one line each, JSON.
--size 13b: the language model of 13B, with `--only llava` 54 GB of disk.

Runs of commit 1f7d5a1, torch 2.13.0+cpu, transformers 5.23.0, two cores of an Intel Xeon, one thread, limit 6 GB:

    command         source      peak        time      files, largest
    official 7b     14.43 GB    0.81 GB     22 s      3, 4.991 GB
    llava    7b     14.13 GB    0.83 GB     24 s      3, 4.985 GB
    llava    13b    26.70 GB    1.07 GB     60 s      6, 4.970 GB
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
LIMIT_GB = 6.0
BIN_BYTES, SAFETENSORS_BYTES = 10 * 10**9, 5 * 10**9

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


LARGE_TEXT = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
              "num_key_value_heads": 40}  # fmt: skip


def tower_shapes() -> dict[str, tuple[int, ...]]:
    c, h = VISION["hidden_size"], VISION["intermediate_size"]
    shapes = {
        "embeddings.class_embedding": (c,),
        "embeddings.patch_embedding.weight": (c, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, c),
    }
    linears = {f"self_attn.{name}_proj": (c, c) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (h, c), "mlp.fc2": (c, h)}
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(VISION["num_hidden_layers"]):
        norms += [f"encoder.layers.{i}.layer_norm{j}" for j in (1, 2)]
        for name, (rows, columns) in linears.items():
            shapes |= {f"encoder.layers.{i}.{name}.weight": (rows, columns), f"encoder.layers.{i}.{name}.bias": (rows,)}
    return shapes | {f"{norm}.{kind}": (c,) for norm in norms for kind in ("weight", "bias")}


def language_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    d, h = TEXT["hidden_size"], TEXT["intermediate_size"]
    shapes = {"embed_tokens.weight": (rows, d)}
    for i in range(TEXT["num_hidden_layers"]):
        shapes |= {f"layers.{i}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"layers.{i}.mlp.{name}_proj.weight": (h, d) for name in ("gate", "up")}
        shapes[f"layers.{i}.mlp.down_proj.weight"] = (d, h)
        shapes |= {f"layers.{i}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    return shapes | {"norm.weight": (d,)}


def official_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {f"model.{name}": shape for name, shape in language_shapes(32000).items()}
    shapes["lm_head.weight"] = (32000, TEXT["hidden_size"])
    for name, (rows, columns) in {
        "mm_projector_crosslayer.0": (4096, 8192),
        "mm_projector_crosslayer.2": (1024, 4096),
        "mm_projector.0": (16384, 4096),
        "mm_projector.2": (TEXT["hidden_size"], 16384),
    }.items():
        shapes |= {f"model.{name}.weight": (rows, columns), f"model.{name}.bias": (rows,)}
    prefix = "model.vision_tower.vision_tower.vision_model."
    return shapes | {prefix + name: shape for name, shape in tower_shapes().items()}


def llava_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {f"vision_tower.vision_model.{name}": shape for name, shape in tower_shapes().items()}
    shapes |= {f"language_model.model.{name}": shape for name, shape in language_shapes(32064).items()}
    d = TEXT["hidden_size"]
    shapes["language_model.lm_head.weight"] = (32064, d)
    for i, columns in ((1, 1024), (2, d)):
        shapes[f"multi_modal_projector.linear_{i}.weight"] = (d, columns)
        shapes[f"multi_modal_projector.linear_{i}.bias"] = (d,)
    return shapes


def write(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict, suffix: str, limit: int) -> None:
    """Random bf16 tensors in shards of at most `limit` bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    parts, size = [{}], 0
    for name, shape in shapes.items():
        bytes_of = 2 * torch.Size(shape).numel()
        if parts[-1] and size + bytes_of > limit:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += bytes_of
    stem = "pytorch_model" if suffix == "bin" else "model"
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05}-of-{len(parts):05}.{suffix}"
        # Not torch.randn: it takes a minute a shard. Random bits with the exponent of values around 0.01.
        tensors = {
            name: (torch.randint(0, 128, shape, dtype=torch.int16) + 0x3C00).view(torch.bfloat16)
            for name, shape in part.items()
        }
        (torch.save if suffix == "bin" else save_file)(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
        del tensors
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def anonymous_kb(pid: int) -> int:
    """RssAnon: memory that no file backs; mapped shards are not in it."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def measure(command: str, src: Path, dst: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_integration.convert", command, str(src), str(dst)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peak, samples, done = 0, 0, threading.Event()

    def sample() -> None:
        nonlocal peak, samples
        while not done.wait(0.005):
            peak, samples = max(peak, anonymous_kb(process.pid)), samples + 1

    thread = threading.Thread(target=sample)
    thread.start()
    code = process.wait()
    done.set()
    thread.join()
    if code:
        raise SystemExit(f"{command}: exit code {code}")
    files = list(dst.glob("*.safetensors"))
    return {
        "command": command,
        "peak_anonymous_gb": round(peak * 1024 / 1e9, 2),
        "limit_gb": LIMIT_GB,
        "seconds": round(time.monotonic() - start, 1),
        "samples": samples,
        "source_gb": round(sum(file.stat().st_size for file in src.iterdir()) / 1e9, 2),
        "files": len(files),
        "largest_file_gb": round(max(file.stat().st_size for file in files) / 1e9, 3),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="leave the last source and result there")
    parser.add_argument("--size", choices=["7b", "13b"], default="7b", help="of the language model, default 7b")
    parser.add_argument("--only", choices=["official", "llava"], help="one of the two commands")
    options = parser.parse_args()
    if options.size == "13b":
        TEXT.update(LARGE_TEXT)
    options.folder.mkdir(parents=True, exist_ok=True)
    official = TEXT | {
        "model_type": "llava_llama", "vocab_size": 32000, "mm_hidden_size": 1024, "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_aspect_ratio": "pad",
    }  # fmt: skip
    llava = {
        "model_type": "llava", "vision_config": VISION, "text_config": TEXT | {"vocab_size": 32064},
        "image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    kept = True
    for command, shapes, config, suffix, limit in (
        ("official", official_shapes(), official, "bin", BIN_BYTES),
        ("llava", llava_shapes(), llava, "safetensors", SAFETENSORS_BYTES),
    ):
        if options.only not in (None, command):
            continue
        src, dst = options.folder / f"{command}-src", options.folder / f"{command}-stf"
        write(src, shapes, config, suffix, limit)
        result = measure(command, src, dst)
        print(json.dumps(result), flush=True)
        kept &= result["peak_anonymous_gb"] < LIMIT_GB
        if not (options.keep and command == "llava"):
            shutil.rmtree(src)
            shutil.rmtree(dst)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
