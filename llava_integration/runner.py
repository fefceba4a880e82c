"""Prefill with nothing dynamic in it: static buffers, a static cache, no synchronisation; on a GPU one CUDA graph.

    ids [B, S], pixels [N, 3, S', S'] -> tower loop -> projector -> inputs_embeds -> language model -> logits [B, vocab]

Attention reads the fresh keys and values, not the longer static buffers they are stored in, so the causal mask needs no
tensor and the flash kernels apply. Works for every family and, as its baseline, for the stock model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stf_kernels import prepare

from .core.config import resolve_layers, vision_grid
from .core.insertion import check_token_count, image_rows
from .core.model import CompactModel, project
from .core.register import families
from .core.tiles import flat_tiles, pack_tiles
from .core.tower import check_pixels, tower_hidden_states

WARM_UP_RUNS = 3
MOST_GRAPHS = 16  # and pixel buffers: images of any sizes would bring one each
# A name with an attention and no mask function: transformers then makes no mask, and sdpa is causal by its own flag.
UNMASKED_SDPA = "stf_unmasked_sdpa"
AttentionInterface.register(UNMASKED_SDPA, sdpa_attention_forward)


class _PrefillLayer(StaticLayer):
    """Stores keys and values at the start of a StaticLayer and hands attention only the fresh ones."""

    def __init__(self, target: StaticLayer):
        super().__init__(target.max_cache_len)
        self.target = target

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        length = key_states.shape[-2]
        self.target.keys[:, :, :length].copy_(key_states)
        self.target.values[:, :, :length].copy_(value_states)
        self.target.cumulative_length.fill_(length)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0


class PrefillRunner:
    """Repeated prefill of one shape.

    Args:
        model: a ForConditionalGeneration of LLaVA-STF or a stock one, in eval mode, on one device.
        batch, seq_len: shape [B, S] of input_ids; every prompt full, no padding.
        max_new_tokens: room in `.cache` for decoding afterwards.
        full_tower: also run the tower layers that the model computes without using, as the stock forward does.

    `runner(input_ids, pixel_values)` -> logits [B, vocab] of the last position, with image_sizes where images are cut
    into tiles. A graph is captured at the first call with each number of images N, or with their sizes; the newest 16
    are kept. `.cache` is then a StaticCache of length S; the next call overwrites it. Token counts of ids on the GPU
    are trusted, because reading them would wait for it.

    Raises TypeError for another model and for ids or pixels of another type, ValueError for a shape that is not the
    runner's, for padding and for sliding-window layers.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, seq_len: int, *, max_new_tokens: int = 128, full_tower: bool = False
    ):
        if not any(isinstance(model, family.stock) for family in families()):
            got = type(model).__name__
            raise TypeError(f"model: expected a LLaVA or LLaVA-STF ForConditionalGeneration, got {got}")
        for name, value, least in (("batch", batch, 1), ("seq_len", seq_len, 1), ("max_new_tokens", max_new_tokens, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
        if model.training:
            raise ValueError("model: expected eval mode, got training mode; call model.eval()")
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) != 1:
            raise ValueError(f"model: expected all parameters on one device, got {sorted(devices)}")
        self.model, self.batch, self.seq_len, self.full_tower = model, batch, seq_len, full_tower
        self.device, self._tiled = model.device, hasattr(model.config, "image_grid_pinpoints")
        text = model.config.text_config
        self.cache = StaticCache(config=text, max_cache_len=seq_len + max_new_tokens)
        if kinds := {type(layer) for layer in self.cache.layers} - {StaticLayer}:
            raise ValueError(f"model: expected plain attention layers, got {sorted(kind.__name__ for kind in kinds)}")
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        dtype = model.get_input_embeddings().weight.dtype
        self.cache.early_initialization(batch, heads, head_dim, dtype, model.device)  # buffers that exist already
        self._prefill_cache = Cache(layers=[_PrefillLayer(layer) for layer in self.cache.layers])
        self._ids = torch.zeros(batch, seq_len, dtype=torch.long, device=self.device)
        self._positions = torch.arange(seq_len, device=self.device).unsqueeze(0)
        # By a key: the number of images; of tiles the images' sizes and which belong together
        self._pixels: dict[Any, Tensor] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes=None,
        attention_mask=None,
        batch_num_images=None,
    ) -> Tensor:
        """input_ids [B, S] int64, pixel_values [N, 3, h, w] or None -> logits [B, vocab]; fills `.cache`.

        Tiles: pixel_values [N, T, 3, h, w] or [tiles, 3, h, w], image_sizes N x (height, width), batch_num_images as in
        OneVision. attention_mask [B, S], of ones only: what a processor gives is taken as it is, but not prompts of
        unequal length.
        """
        key: Any = 0 if pixel_values is None else len(pixel_values)
        if pixel_values is not None and self._tiled:
            pixel_values = flat_tiles(self.model.config, pixel_values, image_sizes, batch_num_images)
            together = None if batch_num_images is None else tuple(torch.as_tensor(batch_num_images).tolist())
            key = tuple(map(tuple, torch.as_tensor(image_sizes).tolist())), together
        self._check(input_ids, pixel_values, attention_mask)
        self._ids.copy_(input_ids, non_blocking=True)
        if pixel_values is not None:
            if key not in self._pixels:
                while len(self._pixels) >= MOST_GRAPHS:
                    oldest = next(iter(self._pixels))
                    del self._pixels[oldest]
                    self._graphs.pop(oldest, None)
                dtype = self.model.model.vision_tower.dtype
                self._pixels[key] = torch.empty(pixel_values.shape, dtype=dtype, device=self.device)
            self._pixels[key].copy_(pixel_values, non_blocking=True)
        if self.device.type != "cuda":
            return self._prefill(key)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits.clone()

    def _capture(self, key: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if key:
            projector, grid = self.model.model.multi_modal_projector, vision_grid(self.model.config.vision_config)
            prepare(projector, batch_sizes=(len(self._pixels[key]),), grid=grid)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._prefill(key)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = self._prefill(key)
        return graph, logits

    def _prefill(self, key: Any) -> Tensor:
        model = self.model.model
        embeds = model.get_input_embeddings()(self._ids)
        if key:
            self._place_images(embeds.view(-1, embeds.shape[-1]), key)
        # No mask tensor for sdpa: transformers 5.17 makes one under capture, and flash kernels take none.
        config = model.language_model.config
        attention = config._attn_implementation
        try:
            config._attn_implementation = UNMASKED_SDPA if attention == "sdpa" else attention
            hidden = model.language_model(
                inputs_embeds=embeds, position_ids=self._positions, past_key_values=self._prefill_cache, use_cache=True
            ).last_hidden_state
        finally:
            config._attn_implementation = attention
        return self.model.lm_head(hidden[:, -1])

    def _place_images(self, flat: Tensor, key: Any) -> None:
        """Projected image tokens into the rows of flat [B*S, D] that hold image tokens."""
        model, config, pixels = self.model.model, self.model.config, self._pixels[key]
        mask = self._ids == config.image_token_id
        layers = resolve_layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        blocks = tower_hidden_states(model.vision_tower, pixels, layers, run_all=self.full_tower)
        if isinstance(model, CompactModel) and not self._tiled:
            rows = image_rows(mask, len(pixels) * config.image_seq_length)
            model.multi_modal_projector(blocks, model.vision_grid, out=flat, rows=rows)
            return
        features = project(model, blocks)
        if self._tiled:
            features = torch.cat(pack_tiles(model, features, model.image_newline, *key))
        else:
            features = features.flatten(0, 1)
        if self.device.type == "cpu" and int(mask.sum()) != len(features):
            raise ValueError(f"input_ids: found {int(mask.sum())} image tokens, but {len(features)} are needed")
        flat.index_copy_(0, image_rows(mask, len(features)), features)

    def _check(self, input_ids: Tensor, pixel_values: Tensor | None, mask: Tensor | None) -> None:
        config, expected = self.model.config, list(self._ids.shape)
        if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.long:
            got = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(f"input_ids: expected an int64 tensor of dtype torch.int64, got {got}")
        if (got := list(input_ids.shape)) != expected:
            raise ValueError(f"input_ids: expected shape {expected}, got {got}; a PrefillRunner serves one shape")
        if mask is not None and (got := list(mask.shape)) != expected:
            raise ValueError(f"attention_mask: expected shape {expected}, got {got}")
        text = config.text_config
        pad = text.pad_token_id if text.pad_token_id not in (text.bos_token_id, text.eos_token_id) else None
        if mask is None and pad is not None and input_ids.device.type == "cpu":
            mask = input_ids[:, [0, -1]] != pad
        if mask is not None and not mask.all():
            rows = (mask == 0).any(1).nonzero().flatten().tolist()
            raise ValueError(f"input_ids: expected prompts without padding, got it in rows {rows}; call the model")
        if pixel_values is not None:
            check_pixels(config.vision_config, pixel_values)
        if input_ids.device.type == "cpu" and isinstance(self.model.model, CompactModel) and not self._tiled:
            token, images = config.image_token_id, 0 if pixel_values is None else len(pixel_values)
            check_token_count(input_ids == token, images * config.image_seq_length, token)
