"""Prefill with nothing dynamic in it: static buffers, a static cache, no synchronisation; on a GPU one CUDA graph.

    ids [B, S], pixels [N, 3, S', S'] -> tower loop -> projector -> inputs_embeds -> language model -> logits [B, vocab]

During prefill attention reads the fresh keys and values, not the longer static buffers they are stored in, so the
causal mask needs no tensor and the flash kernels apply, under capture too. Works for LLaVA-STF and, as its baseline,
for the stock LLaVA.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration, PreTrainedConfig, StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stf_kernels import prepare

from .core.config import resolve_layers
from .core.insertion import check_token_count, image_rows
from .core.model import CompactModel
from .core.tower import check_pixels, tower_hidden_states

WARM_UP_RUNS = 3
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
        model: LlavaStfForConditionalGeneration or LlavaForConditionalGeneration, in eval mode, on one device.
        batch, seq_len: shape [B, S] of input_ids; every prompt full, no padding.
        max_new_tokens: room in `.cache` for decoding afterwards.
        full_tower: also run the tower layers that the model computes without using, as the stock forward does.

    `runner(input_ids, pixel_values)` -> logits [B, vocab] of the last position. A graph is captured at the first call
    with each number of images N. `.cache` is then a StaticCache of length S; the next call overwrites it. Token counts
    are checked for ids on the CPU; ids on the GPU are trusted, because reading them would wait for the device.

    Raises TypeError for another model and for ids or pixels of another type, ValueError for a shape that is not the
    runner's and for sliding-window layers.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        batch: int,
        seq_len: int,
        *,
        max_new_tokens: int = 128,
        full_tower: bool = False,
    ):
        if not isinstance(model, LlavaForConditionalGeneration):
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
        self.device = model.device
        self.cache = _static_cache(model, batch, seq_len + max_new_tokens)
        self._prefill_cache = Cache(layers=[_PrefillLayer(layer) for layer in self.cache.layers])
        self._ids = torch.zeros(batch, seq_len, dtype=torch.long, device=self.device)
        self._positions = torch.arange(seq_len, device=self.device).unsqueeze(0)
        self._pixels: dict[int, Tensor] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """input_ids [B, S] int64, pixel_values [N, 3, h, w] or None -> logits [B, vocab]; fills `.cache`."""
        self._check(input_ids, pixel_values)
        images = 0 if pixel_values is None else len(pixel_values)
        self._ids.copy_(input_ids, non_blocking=True)
        if pixel_values is not None:
            dtype = self.model.model.vision_tower.dtype
            if images not in self._pixels:
                self._pixels[images] = torch.empty(pixel_values.shape, dtype=dtype, device=self.device)
            self._pixels[images].copy_(pixel_values, non_blocking=True)
        if self.device.type != "cuda":
            return self._prefill(images)
        if images not in self._graphs:
            self._graphs[images] = self._capture(images)
        graph, logits = self._graphs[images]
        graph.replay()
        return logits.clone()

    def _capture(self, images: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        if images:
            prepare(self.model.model.multi_modal_projector, batch_sizes=(images,), grid=(side, side))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._prefill(images)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = self._prefill(images)
        return graph, logits

    def _prefill(self, images: int) -> Tensor:
        model = self.model.model
        embeds = model.get_input_embeddings()(self._ids)
        if images:
            self._place_images(embeds.view(-1, embeds.shape[-1]), self._pixels[images])
        with _unmasked(model.language_model.config):
            hidden = model.language_model(
                inputs_embeds=embeds, position_ids=self._positions, past_key_values=self._prefill_cache, use_cache=True
            ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])

    def _place_images(self, flat: Tensor, pixels: Tensor) -> None:
        """Projected image tokens into the rows of flat [B*S, D] that hold image tokens."""
        model, config = self.model.model, self.model.config
        mask = self._ids == config.image_token_id
        layers = resolve_layers(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        blocks = tower_hidden_states(model.vision_tower, pixels, layers, run_all=self.full_tower)
        if isinstance(model, CompactModel):
            rows = image_rows(mask, len(pixels) * config.image_seq_length)
            model.multi_modal_projector(blocks, model.vision_grid, out=flat, rows=rows)
            return
        if config.vision_feature_select_strategy == "default":
            blocks = [block[:, 1:] for block in blocks]
        features = model.multi_modal_projector(torch.cat(blocks, dim=-1) if len(blocks) > 1 else blocks[0])
        features = features.flatten(0, 1)
        if self.device.type == "cpu" and int(mask.sum()) != len(features):
            raise ValueError(f"input_ids: found {int(mask.sum())} image tokens, but {len(features)} are needed")
        flat.index_copy_(0, image_rows(mask, len(features)), features)

    def _check(self, input_ids: Tensor, pixel_values: Tensor | None) -> None:
        config, expected = self.model.config, [self.batch, self.seq_len]
        if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.long:
            got = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(f"input_ids: expected an int64 tensor of dtype torch.int64, got {got}")
        if (got := list(input_ids.shape)) != expected:
            raise ValueError(f"input_ids: expected shape {expected}, got {got}; a PrefillRunner serves one shape")
        if pixel_values is not None:
            check_pixels(config.vision_config, pixel_values)
        if input_ids.device.type == "cpu" and isinstance(self.model.model, CompactModel):
            token, images = config.image_token_id, 0 if pixel_values is None else len(pixel_values)
            check_token_count(input_ids == token, images, config.image_seq_length, token)


@contextlib.contextmanager
def _unmasked(config: PreTrainedConfig) -> Iterator[None]:
    """No mask tensor for sdpa: transformers 5.17 makes one when a stream is captured, and flash kernels take none."""
    given = config._attn_implementation
    if given == "sdpa":
        config._attn_implementation = UNMASKED_SDPA
    try:
        yield
    finally:
        config._attn_implementation = given


def _static_cache(model: LlavaForConditionalGeneration, batch: int, length: int) -> StaticCache:
    """A StaticCache whose buffers exist already, all layers plain."""
    text = model.config.text_config
    cache = StaticCache(config=text, max_cache_len=length)
    kinds = {type(layer) for layer in cache.layers} - {StaticLayer}
    if kinds:
        raise ValueError(f"model: expected plain attention layers, got {sorted(kind.__name__ for kind in kinds)}")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache.early_initialization(batch, heads, head_dim, model.get_input_embeddings().weight.dtype, model.device)
    return cache
