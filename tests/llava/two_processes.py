"""One rank of a tensor-parallel run on CPUs; test_llava_loading.py starts two of them.

RANK=0 WORLD_SIZE=2 ... python tests/llava/two_processes.py FOLDER      prints one JSON line
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import llava_integration  # noqa: F401


def main(folder: str) -> None:
    torch.set_num_threads(1)
    inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    model = AutoModelForImageTextToText.from_pretrained(folder, distributed_config=config)
    with torch.no_grad():
        logits = model(**inputs).logits
    text = model.model.language_model.layers[0]
    result = {
        "query": list(local(text.self_attn.q_proj.weight).shape),
        "projector": {name: list(local(p).shape) for name, p in model.model.multi_modal_projector.named_parameters()},
        "logits": local(logits, whole=True).double().tolist(),
    }
    print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of torch 2.11's gloo may outlive the group, and would abort an orderly end


def local(tensor: torch.Tensor, whole: bool = False) -> torch.Tensor:
    """What this rank holds, or the whole of it."""
    if not hasattr(tensor, "to_local"):
        return tensor
    return tensor.full_tensor() if whole else tensor.to_local()


if __name__ == "__main__":
    main(sys.argv[1])
