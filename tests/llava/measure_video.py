"""Time of a video's frames encoded together against one by one: tower of CLIP-L's width, projector, fp32 on a CPU.

    python tests/llava/measure_video.py [--frames 32] [--layers 2] [--threads N] [--rounds 3]

Not a test: seconds depend on the machine. They are CPU seconds of the process, which neighbours disturb less than the
clock on the wall does. Rounds alternate between the three ways, and the smallest of each counts:

    one by one    project_images(frame) for every frame
    together      project_images(frames): vision_tower.image_chunks takes as many as fit CPU_ACTIVATION_BYTES
    one batch     the same without chunks

Run of commit eb51e8a, torch 2.13.0+cpu, two cores of an Intel Xeon, 32 frames, three rounds: 6.66 s one by one, 6.68 s
together (the same work: one frame of CLIP-L at a time in fp32), 7.04 s in one batch.

Exits 1 when together is slower than one by one by more than 2 %, which is what one run differs from the next.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_integration import LlavaStfConfig, LlavaStfModel, vision_tower

NOISE = 0.02


def build(layers: int) -> LlavaStfModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, vocab_size=8)
    config = LlavaStfConfig(
        vision_config=vision, text_config=text, vision_feature_layer=list(range(layers - 1, -1, -1)),
        stf_hidden_size=1024,
    )  # fmt: skip
    return LlavaStfModel(config).eval()


def seconds(model: LlavaStfModel, pixels: torch.Tensor, step: int, limit: int) -> float:
    vision_tower.CPU_ACTIVATION_BYTES = limit
    start = time.process_time()
    with torch.no_grad():
        for part in pixels.split(step):
            model.project_images(part)
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, pixels = build(options.layers), torch.randn(options.frames, 3, 336, 336)
    limit = vision_tower.CPU_ACTIVATION_BYTES
    ways = {
        "one by one": (1, limit),
        "together": (options.frames, limit),
        "one batch": (options.frames, 2**62),
    }
    times = {name: [] for name in ways}
    seconds(model, pixels[:2], 2, limit)
    for _ in range(options.rounds):
        for name, (step, size) in ways.items():
            times[name].append(seconds(model, pixels, step, size))
    best = {name: min(values) for name, values in times.items()}
    for name, value in best.items():
        print(f"{name:12} {value:7.2f} s   {value / best['one by one']:.3f}   all {[round(v, 2) for v in times[name]]}")
    return int(best["together"] > (1 + NOISE) * best["one by one"])


if __name__ == "__main__":
    sys.exit(main())
