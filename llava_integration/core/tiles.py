"""Images in tiles, as LLaVA-NeXT cuts them: a small copy of the whole one, then R x C tiles of a larger one.

    [N, T, 3, S, S] or [tiles, 3, S, S]  ->  tower, projector  ->  [tiles, (H//r)*(W//r), D]  ->  N x [tokens, D]

To the stock classes' own packing a window is a patch of p*r pixels: S // (p*r) = (S // p) // r tokens a side, with and
without truncation. So what they do behind the projector follows from their own code, in model and processor alike: the
order of tokens and tiles, the padding that is cut off, the newline behind each row, the limit on many tiles.
"""

import copy
import inspect
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .config import Layers
from .model import CompactModel


class _OnHost(TorchFunctionMode):
    """Lists become tensors on the host: the lengths that a packing returns would wait for a GPU, or end its capture."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor:
            kwargs.pop("device", None)
        return function(*args, **kwargs)


class TiledModel(CompactModel):
    """A CompactModel of tiles; in front of LlavaNextModel or one that packs like it."""

    feature_options = (*CompactModel.feature_options, "vision_aspect_ratio", "batch_num_images")

    def build(self, config: PreTrainedConfig) -> None:
        super().build(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    def pack_image_features(self, *args, **kwargs):
        """The stock model's, for tiles of (H//r) x (W//r) tokens: N x [T, (H//r)*(W//r), D] -> N x [tokens, D]."""
        vision, config = copy.copy(self.config.vision_config), copy.copy(self.config)
        vision.patch_size *= config.spatial_merge_size
        vars(config)["vision_config"] = vision  # past the checks: nobody but the stock code sees it
        return super().pack_image_features.__func__(SimpleNamespace(config=config), *args, **kwargs)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        vision_feature_layer: Layers = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: Tensor | None = None,
        whole_tower: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """What the tower returns for all tiles, with `.pooler_output`: N tensors [tokens of the image, D].

        whole_tower=False: nothing but the tokens, as `forward` needs them, from the layers that they need.
        Raises ValueError where pixel values and image sizes do not belong together, for a select strategy other than
        the config's and for `interpolate_pos_encoding`.
        """
        self.check_options(vision_feature_select_strategy, **kwargs)
        tiles = flat_tiles(self.config, pixel_values, image_sizes, batch_num_images)
        outputs = self.image_outputs(tiles, vision_feature_layer, whole_tower, **kwargs)
        packing = {"batch_num_images": batch_num_images, "vision_aspect_ratio": vision_aspect_ratio}
        outputs.pooler_output = pack_tiles(self, outputs.pooler_output, self.image_newline, image_sizes, **packing)
        return outputs

    own_image_features = get_image_features

    def check_pixels(self, pixel_values: Tensor) -> None:
        five = isinstance(pixel_values, Tensor) and pixel_values.ndim == 5
        super().check_pixels(pixel_values.flatten(0, 1) if five else pixel_values)

    def check_prompt(self, input_ids: Tensor | None, pixel_values: Tensor, image_sizes=None, **options) -> None:
        flat_tiles(self.config, pixel_values, image_sizes, options.get("batch_num_images"))
        super().check_prompt(input_ids, pixel_values, image_sizes=image_sizes, **options)

    def image_token_counts(self, pixel_values, image_sizes=None, batch_num_images=None, vision_aspect_ratio=None, **_):
        """Tokens of every image of (height, width) `image_sizes`; pixel values are not looked at."""
        tiles = tile_counts(self.config, image_sizes, batch_num_images)[1]
        tokens = torch.empty(sum(tiles), self.config.image_seq_length, 1, device="meta")
        sizes, newline = (image_sizes, batch_num_images), tokens[0, 0]
        return list(map(len, pack_tiles(self, tokens, newline, *sizes, vision_aspect_ratio=vision_aspect_ratio)))

    def _writes_in_place(self, inputs_embeds: Tensor) -> bool:
        return False  # the projector's rows are packed before they go into a prompt


def tile_counts(config: PreTrainedConfig, image_sizes, batch_num_images=None) -> tuple[list[list[int]], list[int]]:
    """(height, width) of every image before it was cut, as ints, and how many tiles it was cut into.

    One where it stands with others in a prompt, as `batch_num_images` says.
    """
    if image_sizes is None:
        raise ValueError("image_sizes: expected (height, width) of every image, as the processor gives, got None")
    sizes = [[int(side) for side in size] for size in torch.as_tensor(image_sizes).tolist()]
    alone = [True] * len(sizes)
    if batch_num_images is not None:
        alone = [count == 1 for count in torch.as_tensor(batch_num_images).tolist() for _ in range(count)]
    if len(alone) != len(sizes) or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"image_sizes: expected (height, width) of {len(alone)} image(s), got {sizes}")
    pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
    cut = [image_size_to_num_patches(size, pinpoints, side) for size in sizes]
    return sizes, [count if by_itself else 1 for count, by_itself in zip(cut, alone, strict=True)]


def flat_tiles(config: PreTrainedConfig, pixel_values: Tensor, image_sizes, batch_num_images=None) -> Tensor:
    """[N, T, 3, S, S], padded to the most tiles, or [tiles, 3, S, S] -> [tiles, 3, S, S] of all images."""
    counts = tile_counts(config, image_sizes, batch_num_images)[1]
    padded = pixel_values.ndim == 5
    fits = len(pixel_values) == (len(counts) if padded else sum(counts))
    if not fits or (padded and max(counts) > pixel_values.shape[1]):
        what = f"expected {counts} tiles for images of these sizes, got shape {list(pixel_values.shape)}"
        raise ValueError(f"pixel_values, image_sizes: {what}; pass both as the processor made them")
    if not padded:
        return pixel_values
    return torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])


def pack_tiles(model, tokens: Tensor, newline: Tensor, image_sizes, batch_num_images=None, **packing) -> list[Tensor]:
    """tokens [tiles, n, D] of all images, newline [D] -> N tensors [tokens of the image, D].

    `model`: a TiledModel or a stock model, whose packing takes some fields of the configuration as arguments.
    """
    sizes, counts = tile_counts(model.config, image_sizes, batch_num_images)
    stock = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    names = [name for name in inspect.signature(stock.pack_image_features).parameters if hasattr(model.config, name)]
    options = {name: packing.get(name) or getattr(model.config, name) for name in names}
    with _OnHost():
        return model.pack_image_features(list(tokens.split(counts)), sizes, image_newline=newline, **options)[0]
