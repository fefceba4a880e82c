"""One rank of a tensor-parallel run on CPUs, for test_llava_loading.py; writes FOLDER/rank-N.pt.

torchrun --standalone --nproc-per-node=2 tests/llava/two_processes.py FOLDER
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import llava_integration  # noqa: F401


def shape(tensor: torch.Tensor) -> list[int]:
    """Of what this rank holds."""
    return list(getattr(tensor, "_local_tensor", tensor).shape)


folder = sys.argv[1]
torch.set_num_threads(1)
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
config = DistributedConfig(tp_plan="auto", tp_size=2)
model = AutoModelForImageTextToText.from_pretrained(folder, distributed_config=config)
with torch.no_grad():
    logits = model(**inputs).logits
if hasattr(logits, "full_tensor"):
    logits = logits.full_tensor()
projector = {name: shape(parameter) for name, parameter in model.model.multi_modal_projector.named_parameters()}
query = shape(model.model.language_model.layers[0].self_attn.q_proj.weight)
found = {"query": query, "projector": projector, "logits": logits}
torch.save(found, f"{folder}/rank-{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of torch 2.11's gloo may outlive the group, and would abort an orderly end
