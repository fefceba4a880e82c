"""Memory that converting a LLaVA-1.5-7B holds: python .ci/convert_memory.py DIR

Writes a random checkpoint of the 7B sizes under DIR, in bf16 and shards of 5 GB as it is published, converts it in a
process of its own and samples that process's RssAnon, memory that no file backs. Takes 28 GB of disk, which go again.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


def write_checkpoint(folder: Path) -> None:
    """Shapes from the model on the meta device; values are random bits with the exponent of values around 0.01."""
    folder.mkdir(parents=True)
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=32064))  # the tower is CLIP-L/14-336 by default
    with torch.device("meta"):
        shapes = LlavaForConditionalGeneration(config).to(torch.bfloat16).state_dict()
    config.save_pretrained(folder)
    split = split_torch_state_dict_into_shards(shapes, max_shard_size="5GB")
    for file, names in split.filename_to_tensors.items():
        bits = {name: torch.randint(0, 128, shapes[name].shape, dtype=torch.int16) + 0x3C00 for name in names}
        save_file({name: value.view(torch.bfloat16) for name, value in bits.items()}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path, metavar="DIR")
folder = parser.parse_args().folder
src, dst, peak = folder / "llava-src", folder / "llava-stf", 0
write_checkpoint(src)
process = subprocess.Popen([sys.executable, "-m", "llava_integration.convert", "llava", src, dst])
while process.poll() is None:
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = max([peak, *(int(kib) * 1024 for kib in re.findall(r"^RssAnon:\s+(\d+)", status, re.MULTILINE))])
    time.sleep(0.005)
sizes = [file.stat().st_size for file in dst.glob("*.safetensors")]
print(f"peak {peak / 1e9:.2f} GB for {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files")
shutil.rmtree(src)
shutil.rmtree(dst, ignore_errors=True)
sys.exit(process.returncode)
