"""What a frozen vision tower says about each image, kept on disk: a step then reads M x T x C values and runs no tower.

DIR/cache.json                  whose features these are: SHA-256 of tower and processor, layers
DIR/ab/abcdef....safetensors    {"blocks": [M, T, C]}, CLS included, of the image file with this SHA-256
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from stf_kernels.command import BadInput

from .core.config import prefix_tokens, resolve_layers, vision_grid
from .core.model import project
from .core.tower import tower_hidden_states
from .images import picture

RESERVE = 2**28  # bytes that filling leaves free


class DataError(BadInput):
    """Data that cannot be trained on; the message names file, line and field."""


class FeatureCache:
    """Blocks of a model's frozen tower, by image file; a model with fewer layers reads those it has of them.

    Raises BadInput for a folder that another tower, processor or choice of layers filled.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.folder, self.tower, self.process = folder, model.model.vision_tower, processor.image_processor
        config = model.config
        self.layers = resolve_layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        settings = json.dumps(self.process.to_dict(), sort_keys=True, default=str).encode()
        parts = {"tower": save(self.tower.state_dict()), "processor": settings}
        owner = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "cache.json"
        self.stored = self.layers
        if about.exists():
            found = json.loads(about.read_text(encoding="utf-8"))
            self.stored = found["layers"]
            different = [name for name in owner if found[name] != owner[name]]
            different += ["choice of layers"] * (not set(self.layers) <= set(self.stored))
            if different:
                raise BadInput(f"--cache-features: {folder} is of another {' and another '.join(different)}")
        else:
            write_whole(about, json.dumps(owner | {"layers": self.layers}).encode())

    def path(self, image: Path) -> Path:
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def __getitem__(self, image: Path) -> Tensor:
        """[M, T, C] of the model's own layers, memory-mapped."""
        path = self.path(image)
        if not path.exists():
            open_image(image)  # DataError: why it was left out
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice("blocks")
                return torch.stack([stored[self.stored.index(layer)] for layer in self.layers])
        except (OSError, SafetensorError) as error:
            raise BadInput(f"--cache-features: {path}, of {image}, cannot be read ({error}); delete it") from None

    def fill(self, images: Sequence[Path], batch: int = 8) -> None:
        """Encode what is not there yet; every process its share. Images that do not decode are left out."""
        state = PartialState()
        missing = [image for image in images if not self.path(image).exists()]
        config, size = self.tower.config, next(self.tower.parameters()).element_size()
        tokens = vision_grid(config)[0] ** 2 + prefix_tokens(config)
        need = len(missing) * len(self.stored) * tokens * config.hidden_size * size
        free = shutil.disk_usage(self.folder).free - RESERVE
        said = f"{len(missing)} images need {need / 2**30:.2f} GiB in {self.folder}, {free / 2**30:.2f} GiB are free"
        if need > free:
            raise BadInput(f"--cache-features: {said}; give a folder on a larger disk, or train without")
        if missing and state.is_main_process:
            print(said, file=sys.stderr)
        mine = missing[state.process_index :: state.num_processes]
        for start in tqdm(range(0, len(mine), batch), desc="features", unit=f"x{batch}", disable=None):
            opened = {}
            for image in mine[start : start + batch]:
                with contextlib.suppress(DataError):  # named, with its record, when that is read
                    opened[image] = open_image(image)
            if opened:
                pixels = self.process(list(opened.values()), return_tensors="pt")["pixel_values"]
                for image, blocks in zip(opened, self.encode(pixels), strict=True):
                    write_whole(self.path(image), save({"blocks": blocks}))
        state.wait_for_everyone()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> list[Tensor]:
        """pixel_values [N, 3, S, S] -> N tensors [M, T, C] on the CPU."""
        blocks = torch.stack(tower_hidden_states(self.tower, pixels, self.stored), dim=1)
        return [block.contiguous() for block in blocks.cpu()]


def open_image(path: Path) -> Image.Image:
    """Decoded now, as the processor decodes it."""
    try:
        return picture(path)
    except Exception as error:  # codecs raise what they like
        raise DataError(f"image: {path} does not decode ({error})") from None


def accept_blocks(model: PreTrainedModel) -> None:
    """Let forward take image_blocks [N, M, T, C] in place of pixel_values, for LLaVA-1.5 and LLaVA-STF alike."""
    # On the inner model: inside the forward that DDP, FSDP, autocast and PEFT wrap.
    model.model.register_forward_pre_hook(_take_blocks, with_kwargs=True)


def _take_blocks(base: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    given = kwargs.pop("image_blocks", None)
    if given is None:
        return None
    blocks = [block.to(base.dtype) for block in given.unbind(1)]
    tokens, ids = project(base, blocks), kwargs["input_ids"]
    embeds = base.get_input_embeddings()(ids)
    mask = (ids == base.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(mask, tokens.flatten(0, 1).to(embeds.dtype))
    return args, kwargs | {"input_ids": None, "inputs_embeds": embeds}


def write_whole(path: Path, content: bytes) -> None:
    """Beside `path`, then renamed."""
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
