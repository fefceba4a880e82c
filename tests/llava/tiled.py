"""Small random models and processors of every family, and what packs tiles, written from its rules."""

import math

import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2Config,
)

import llava_integration as li
from tests.llava import build

VIDEO_TOKEN = 1
# (height, width): portrait, landscape, tiny, square, as wide and as high as it gets, a tile exactly
SIZES = [(100, 60), (60, 100), (7, 9), (200, 200), (5, 300), (300, 5), (56, 56)]


def pinpoints(side, most):
    """Every grid of up to `most` tiles in a row, as (height, width)."""
    return [[h * side, w * side] for h in range(1, most + 1) for w in range(1, most + 1)]


def next_model(dtype=torch.float64, **changes):
    """Tiles of 4x4 behind a CLS token, at most 3 of them in a row."""
    torch.manual_seed(0)
    grids = [grid for grid in pinpoints(build.PIXELS, 3) if math.prod(grid) < 5 * build.PIXELS**2]
    config = LlavaNextConfig(**build.options(**{"image_grid_pinpoints": grids} | changes))
    return build.randomize(LlavaNextForConditionalGeneration(config).to(dtype))


def onevision_model(dtype=torch.float64, **changes):
    """Tiles of 9x9 and a few pixels more, no CLS token; more than four tiles are scaled down."""
    torch.manual_seed(0)
    vision, text = build.siglip(image_size=130, vision_use_head=False), Qwen2Config(**build.TEXT)
    options = {"vision": vision, "text": text, "video_token_index": VIDEO_TOKEN, "vision_aspect_ratio": "anyres_max_4"}
    config = LlavaOnevisionConfig(**build.options(**options | {"image_grid_pinpoints": pinpoints(130, 4)} | changes))
    return build.randomize(LlavaOnevisionForConditionalGeneration(config).to(dtype))


MODELS = {"next": next_model, "onevision": onevision_model}
ALL = {"llava": build.stock, **MODELS}


class OnevisionProcessor(LlavaOnevisionProcessor):
    """The stock one, which is not to be had where torchvision is not: it insists on a video processor."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def processor(model):
    """The stock processor of a stock model."""
    vision, side = model.config.vision_config, model.config.vision_config.image_size
    square, tokenizer = {"height": side, "width": side}, build.tokenizer(padding_side="left")
    strategy = model.config.vision_feature_select_strategy
    if isinstance(model.config, LlavaConfig):
        images = CLIPImageProcessorPil(**build.square(side))
        return LlavaProcessor(images, tokenizer, vision.patch_size, strategy, num_additional_image_tokens=1)
    options = {"size": square, "crop_size": square, "image_grid_pinpoints": model.config.image_grid_pinpoints}
    if not isinstance(model.config, LlavaOnevisionConfig):  # LLaVA-NeXT and what packs like it
        images = LlavaNextImageProcessorPil(**options)
        return LlavaNextProcessor(images, tokenizer, vision.patch_size, strategy, num_additional_image_tokens=1)
    images = LlavaOnevisionImageProcessorPil(**options)
    options = {"num_image_tokens": (side // vision.patch_size) ** 2, "vision_feature_select_strategy": strategy}
    ratio = model.config.vision_aspect_ratio
    return OnevisionProcessor(images, tokenizer, video_token="<unk>", vision_aspect_ratio=ratio, **options)


def stf_processor(stock, merge_size=None):
    """What goes with `from_llava(stock, merge_size=merge_size)`."""
    made = processor(stock)
    name = type(stock).__name__.replace("ForConditionalGeneration", "StfProcessor")
    return getattr(li, name).from_llava(made, merge_size=merge_size)


def inputs(model, sizes, together=False, dtype=torch.float64):
    """Pixels of images of `sizes`, as the processor cuts them; `together`: of one prompt."""
    images = [build.image(seed, size[::-1]) for seed, size in enumerate(sizes)]
    made = processor(model).image_processor([images] if together else images, return_tensors="pt")
    return {name: value.to(dtype) if name == "pixel_values" else value for name, value in made.items()}


def prompts(stf, made, groups):
    """Padded prompts with `groups[b]` images each, and all that the model gets."""
    ids, mask = build.prompt(groups, stf.model.image_token_counts(**made))
    return {"input_ids": ids, "attention_mask": mask, **made}


def stock_tokens(model, pixel_values):
    """[tiles, 3, S, S] -> what the stock projector makes of each patch, [tiles, H*W, D]."""
    config, inner = model.config, model.model
    with torch.no_grad():
        hidden = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        keep = 1 if config.vision_feature_select_strategy == "default" else 0
        return inner.multi_modal_projector(hidden[:, keep:])


def pooled(tokens, r):
    """[tiles, H*W, D] -> the mean of every r x r window, whole ones only: [tiles, H//r, W//r, D]"""
    side = math.isqrt(tokens.shape[1])
    return F.avg_pool2d(tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2), r).permute(0, 2, 3, 1)


def packed(model, tiles, size):
    """tiles [1 + R*C, h, h, D] of an image of (height, width) `size` -> [tokens, D], from the rules of the two papers.

    The base tile, then row by row the larger picture without its padding, each row ended by the newline; a picture
    of more tiles than vision_aspect_ratio allows is scaled down before. One tile alone is followed by a newline.
    """
    config, newline = model.config, model.model.image_newline.detach()
    base, h = tiles[0].flatten(0, 1), tiles.shape[1]
    if len(tiles) == 1:
        return torch.cat([base, newline[None]])
    rows = best_grid(config, size)[0]
    columns = (len(tiles) - 1) // rows
    lines = [torch.cat([tiles[1 + row * columns + c] for c in range(columns)], dim=1) for row in range(rows)]
    picture = torch.cat(lines, dim=0)  # [rows*h, columns*h, D]
    height, width = picture.shape[:2]
    if size[1] / size[0] > width / height:
        cut = (height - int(round(size[0] * width / size[1], 7))) // 2
        picture = picture[cut : height - cut]
    else:
        cut = (width - int(round(size[1] * height / size[0], 7))) // 2
        picture = picture[:, cut : width - cut]
    if limit := getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_"):
        height, width = picture.shape[:2]
        ratio = math.sqrt(height * width / (int(limit) * h * h))
        if ratio > 1.1:
            target = [int(height // ratio), int(width // ratio)]
            picture = F.interpolate(picture.permute(2, 0, 1)[None], target, mode="bilinear")[0].permute(1, 2, 0)
    ended = torch.cat([picture, newline.expand(len(picture), 1, -1)], dim=1)
    return torch.cat([base, ended.flatten(0, 1)])


def best_grid(config, size):
    """Tiles (rows, columns): the resolution that keeps most of an image, of those the one that wastes least."""
    side = config.vision_config.image_size

    def fit(grid):
        scale = min(grid[0] / size[0], grid[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, -(grid[0] * grid[1] - kept)

    best = max(config.image_grid_pinpoints, key=fit)
    return best[0] // side, best[1] // side


def expected(model, made, sizes, r):
    """What the features of `model` with windows of r x r have to be, one [tokens, D] an image."""
    if "image_sizes" not in made:
        return list(pooled(stock_tokens(model, made["pixel_values"]), r).flatten(1, 2))
    found = []
    for tiles, size in zip(made["pixel_values"], sizes, strict=True):
        alone = made.get("batch_num_images", torch.ones(len(sizes))).max() == 1
        count = math.prod(best_grid(model.config, size)) + 1 if alone else 1
        found.append(packed(model, pooled(stock_tokens(model, tiles[:count]), r), size))
    return found
