"""The parts of a model with a compact projector that do not depend on the family: mixins before the stock classes.

    pixels [N, 3, S, S] -> blocks, M x [N, prefix + H*W, C] -> projector -> [N, (H//r)*(W//r), D] -> inputs_embeds

The blocks reach the projector as they are, CLS included: it skips prefix tokens by its strides.
"""

import copy
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, output_capturing
from transformers.utils.generic import can_return_tuple

from stf_kernels import CompactTokenProjector

from .config import ACTIVATIONS, CompactConfig, Layers, prefix_tokens, resolve_layers, vision_grid
from .insertion import check_token_count, image_rows, images_in_parts, is_captured
from .tower import check_pixels, image_chunks, to_device_of, tower_hidden_states

# Since transformers 5.19 a tower can be told which hidden states to keep.
KEEPS_SOME_STATES = hasattr(output_capturing, "select_hidden_states")
FIXED_GRID = "every image has the grid of the vision tower, which config.image_seq_length counts"
BUILT_BY = (  # a weight's axis, the field that says how long it is, and what it counts
    (".mbtf.linear_1.weight", 1, "vision_feature_layer", "{} layers"),
    (".mbtf.linear_1.weight", 0, "mbtf_hidden_size", "{} units"),
    (".stf.linear_1.weight", 1, "spatial_merge_size", "windows of {} tokens"),
    (".stf.linear_1.weight", 0, "stf_hidden_size", "{} units"),
)
PER_IMAGE = {"image_sizes", "batch_num_images"}  # besides the pixels
SKIP_LISTS = {"llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"}  # of transformers' quantizers


class _Saved:
    """How models of both kinds are stored and loaded; in front of a PreTrainedModel."""

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As PreTrainedModel.save_pretrained, under the names of the modules: a resumed Trainer drops all others."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """As PreTrainedModel.from_pretrained; the projector is what the model is about, and is never quantised."""
        if quantization_config is not None:
            kwargs["quantization_config"] = _without_projector(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """Says which field of the configuration is not the stored projector's, before transformers speaks of sizes."""
        unplaced = sorted(name for name in loading_info.unexpected_keys if ".multi_modal_projector." in name)
        if unplaced:
            names = ("use_mbtf", "multimodal_projector_bias")
            got = ", ".join(f"{name}={getattr(model.config, name)}" for name in names)
            what = f"expected a place for the stored {unplaced[0]}, got {got}"
            raise ValueError(f"{', '.join(names)}: {what}; leave them as config.json has them")
        dim = model.config.vision_config.hidden_size
        for name, stored, built in [] if load_config.ignore_mismatched_sizes else loading_info.mismatched_keys:
            for ending, axis, field, what in BUILT_BY:
                if name.endswith(ending) and stored[axis] != built[axis]:
                    old, new = (shape[axis] // (dim if axis else 1) for shape in (stored, built))
                    got = f"for which the stored {name} was built, got {new}: {getattr(model.config, field)}"
                    remedy = "leave it as config.json has it, or train that weight anew: ignore_mismatched_sizes=True"
                    raise ValueError(f"{field}: expected {what.format(old)}, {got}; {remedy}")
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


def _without_projector(quantization_config):
    """A copy of the configuration, an object or a dict, whose list of modules to skip has the projector in it."""
    is_dict = isinstance(quantization_config, dict)
    given = AutoQuantizationConfig.from_dict(quantization_config) if is_dict else copy.deepcopy(quantization_config)
    for name in SKIP_LISTS & vars(given).keys():
        skipped = ["lm_head"] if getattr(given, name) is None else getattr(given, name)
        setattr(given, name, [*skipped, "multi_modal_projector", "model.multi_modal_projector"])
    return given


def forward_of(stock: type[PreTrainedModel], *more: str) -> Callable:
    """A forward with the signature of `stock` and the keywords `more`, which generate() asks for.

    Of a family's CompactModel it does all that `stock` does after the images, of its CompactGeneration all.
    """
    signature = inspect.signature(stock.forward)
    *known, rest = signature.parameters.values()
    known += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor) for name in more]
    names = [parameter.name for parameter in known[1:]]

    @can_return_tuple
    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        return self.run(stock, **dict(zip(names, args, strict=False)), **kwargs)

    forward.__signature__ = signature.replace(parameters=[*known, rest])
    return forward


def build_projector(config: PreTrainedConfig, **factory) -> CompactTokenProjector:
    """A CompactTokenProjector of the sizes in `config`; `factory`: device, dtype."""
    return CompactTokenProjector(
        len(config.vision_feature_layer),
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        merge_size=config.spatial_merge_size,
        skip_tokens=prefix_tokens(config.vision_config),
        mbtf=config.use_mbtf,
        mbtf_hidden_dim=config.mbtf_hidden_size,
        stf_hidden_dim=config.stf_hidden_size,
        activation=ACTIVATIONS[config.projector_hidden_act],
        bias=config.multimodal_projector_bias,
        truncate=config.spatial_merge_truncate,
        **factory,
    )


def project(model: PreTrainedModel, blocks: list[Tensor]) -> Tensor:
    """M x [N, prefix + H*W, C] -> [N, tokens, D], by the projector of a CompactModel or of a stock model."""
    if isinstance(model, CompactModel):
        return model.multi_modal_projector(blocks, model.vision_grid)
    if model.config.vision_feature_select_strategy == "default":
        blocks = [block[:, 1:] for block in blocks]
    return model.multi_modal_projector(torch.cat(blocks, dim=-1) if len(blocks) > 1 else blocks[0])


class CompactModel(_Saved):
    """Images to tokens, and tokens into the prompt. Expects vision_tower, multi_modal_projector, language_model.

    A family gives `get_image_features`, with a keyword `whole_tower`, and again as `own_image_features`, so that a
    replaced one is noticed and called as whoever replaced it expects.
    """

    multi_modal_projector: nn.Module
    own_image_features: Callable
    # What `get_image_features` takes besides the pixels, of what `forward` does.
    feature_options: tuple[str, ...] = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    def post_init(self):
        # Hidden states of a tower split over devices would have to be gathered; one device is always enough for it.
        self._no_split_modules = [type(self.vision_tower).__name__, type(self.multi_modal_projector).__name__]
        super().post_init()

    def __init__(self, config: PreTrainedConfig):
        if not isinstance(config, CompactConfig):
            got = type(config).__name__
            raise TypeError(f"config: expected a {type(self).config_class.__name__}, got a {got}; see from_llava")
        PreTrainedModel.__init__(self, config)  # not the stock model's, which builds a stock projector
        self.build(config)
        self.post_init()

    def build(self, config: PreTrainedConfig) -> None:
        """The model's own children and parameters."""
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Patches (H, W) of one image."""
        return vision_grid(self.config.vision_config)

    def encode_blocks(self, pixel_values: Tensor, vision_feature_layer: Layers = None) -> list[Tensor]:
        """pixel_values [N, 3, S, S] -> the tower's blocks, M x [N, prefix + H*W, C], on the projector's device."""
        tower, layers = self.vision_tower, self._layers(vision_feature_layer)
        parts = [tower_hidden_states(tower, part, layers) for part in image_chunks(tower, pixel_values)]
        blocks = parts[0] if len(parts) == 1 else [torch.cat(states) for states in zip(*parts, strict=True)]
        return [to_device_of(self.multi_modal_projector, block) for block in blocks]

    def _layers(self, given: Layers) -> list[int]:
        given = self.config.vision_feature_layer if given is None else given  # a list, which anybody may change
        layers = resolve_layers(given, self.config.vision_config.num_hidden_layers)
        expected = getattr(self.multi_modal_projector, "num_blocks", len(layers))
        if len(layers) != expected:
            raise ValueError(f"vision_feature_layer: expected {expected} layers for this projector, got {layers}")
        return layers

    def project_images(self, pixel_values: Tensor, vision_feature_layer: Layers = None) -> Tensor:
        """pixel_values [N, 3, S, S] -> [N, (H//r)*(W//r), D]. Tensor in, tensor out: what torch.compile takes whole."""
        return self.multi_modal_projector(self.encode_blocks(pixel_values, vision_feature_layer), self.vision_grid)

    def image_outputs(
        self, pixel_values: Tensor, layers: Layers = None, whole_tower: bool = True, **kwargs
    ) -> BaseModelOutputWithPooling:
        """What the tower returns for pixel_values [N, 3, S, S], and as pooler_output the tokens [N, (H//r)*(W//r), D].

        `kwargs` are the tower's: output_hidden_states, output_attentions. Without `whole_tower` there is nothing but
        the tokens, from the layers that they need.
        """
        self.check_pixels(pixel_values)
        if not whole_tower:
            return BaseModelOutputWithPooling(pooler_output=self.project_images(pixel_values, layers))
        layers, everything = self._layers(layers), kwargs.pop("output_hidden_states", None)
        kept = layers if KEEPS_SOME_STATES and not everything else True
        pixel_values = to_device_of(self.vision_tower, pixel_values)
        outputs = self.vision_tower(pixel_values, output_hidden_states=kept, return_dict=True, **kwargs)
        blocks = [to_device_of(self.multi_modal_projector, outputs.hidden_states[layer]) for layer in layers]
        outputs.pooler_output = self.multi_modal_projector(blocks, self.vision_grid)
        return outputs

    def tokens_of(self, **options) -> BaseModelOutputWithPooling:
        """get_image_features, and only its tokens where nobody put another one in its place."""
        if self._own_features():
            options["whole_tower"] = False
        return self.get_image_features(**options, return_dict=True)

    def _own_features(self) -> bool:
        given = type(self).get_image_features
        return given is type(self).own_image_features and "get_image_features" not in self.__dict__

    def check_pixels(self, pixel_values: Tensor) -> None:
        """TypeError or ValueError for pixel values that the tower does not take."""
        check_pixels(self.config.vision_config, pixel_values)

    def check_options(self, vision_feature_select_strategy: str | None = None, **options) -> None:
        """ValueError for options of `get_image_features` that have no meaning for this tower or family."""
        expected = self.config.vision_feature_select_strategy
        if vision_feature_select_strategy not in (None, expected):
            what = f"expected {expected!r}, got {vision_feature_select_strategy!r}"
            raise ValueError(f"vision_feature_select_strategy: {what}; windows cover the patches, and no CLS token")
        if options.get("interpolate_pos_encoding"):
            raise ValueError(f"interpolate_pos_encoding: expected False, {FIXED_GRID}; got True")

    def run(
        self,
        stock: type[PreTrainedModel],
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ):
        """Images into the prompt, then `stock.forward` on inputs_embeds [B, S, D]; ids on the CPU are checked first."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "none" if input_ids is None else "both"
            raise ValueError(f"input_ids, inputs_embeds: expected exactly one of them, got {got}")
        encoded = dict(mm_encoder_outputs or {})
        if pixel_values is not None and encoded.get("image") is not None:
            raise ValueError("pixel_values, mm_encoder_outputs: expected at most one of them, got both")
        options = {name: kwargs.pop(name) for name in self.feature_options if name in kwargs}
        videos = kwargs.pop("pixel_values_videos", None)
        kwargs.pop("image_sizes_videos", None)  # frames have the size of the tower's images
        if videos is not None and not hasattr(self, "get_video_features"):
            raise ValueError(f"pixel_values_videos: expected none for {type(self).__name__}; give the frames as images")
        if pixel_values is not None:
            self.check_options(**options)
            self.check_pixels(pixel_values)
            self.check_prompt(input_ids, pixel_values, **options)
            pixel_values = pixel_values if len(pixel_values) else None
        embeds, placed = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds, {}
        if pixel_values is not None and input_ids is not None and self._writes_in_place(embeds):
            placed["image"] = self._write_images(input_ids, embeds, pixel_values, options.get("vision_feature_layer"))
        elif pixel_values is not None:
            encoded["image"] = self.tokens_of(pixel_values=pixel_values, **options)
        if videos is not None:
            encoded["video"] = self.get_video_features(videos, whole_tower=False, return_dict=True)
        for kind in ("image", "video"):
            if encoded.get(kind) is not None:
                pooled = encoded[kind].pooler_output
                tokens = pooled.flatten(0, 1) if isinstance(pooled, Tensor) else torch.cat(list(pooled))
                placed[kind] = tokens.to(embeds.device, embeds.dtype)
                embeds = embeds.masked_scatter(self.placeholders(kind, input_ids, embeds, placed[kind]), placed[kind])
        outputs = stock.forward(self, inputs_embeds=embeds, return_dict=True, **kwargs)
        for kind, tokens in placed.items():
            if hasattr(outputs, f"{kind}_outputs"):  # since transformers 5.24
                per_image = tokens if kind in encoded else tokens.unflatten(0, (-1, self.config.image_seq_length))
                outputs[f"{kind}_outputs"] = encoded.get(kind) or BaseModelOutputWithPooling(pooler_output=per_image)
            elif hasattr(outputs, f"{kind}_hidden_states"):
                outputs[f"{kind}_hidden_states"] = tokens
        return outputs

    @can_return_tuple
    def video_features(
        self,
        pixel_values_videos: Tensor | None = None,
        vision_feature_layer: Layers = None,
        vision_feature_select_strategy: str | None = None,
        whole_tower: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """`get_video_features` of families that have it: as get_image_features, for videos [V, T, 3, S, S].

        `.pooler_output`: V tensors [T*(H//r)*(W//r) and what `end_videos` adds, D], the tokens of the frames in order.
        """
        videos = kwargs.pop("pixel_values", pixel_values_videos)  # so called in transformers 5.17
        if not isinstance(videos, Tensor) or videos.ndim != 5:
            got = list(getattr(videos, "shape", [])) or type(videos).__name__
            raise ValueError(f"pixel_values_videos: expected [videos, frames, channels, height, width], got {got}")
        self.check_options(vision_feature_select_strategy, **kwargs)
        outputs = self.image_outputs(videos.flatten(0, 1), vision_feature_layer, whole_tower, **kwargs)
        outputs.pooler_output = self.end_videos(outputs.pooler_output.unflatten(0, videos.shape[:2]).flatten(1, 2))
        return outputs

    def end_videos(self, tokens: Tensor) -> Tensor | list[Tensor]:
        """tokens [V, T*(H//r)*(W//r), D] -> one item a video."""
        return list(tokens)

    def placeholders(self, kind: str, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        """bool [B, S, 1], True at tokens of "image" or "video"; ValueError unless they are as many as `features`."""
        token = getattr(self.config, f"{kind}_token_id")
        if input_ids is not None:
            mask = input_ids == token
        else:
            token_ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token_ids)).all(-1)
        check_token_count(mask, len(features), token)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def check_prompt(self, input_ids: Tensor | None, pixel_values: Tensor, **options) -> None:
        """ValueError unless ids on the CPU hold the image tokens that are needed; others are counted when inserted."""
        if isinstance(input_ids, Tensor) and input_ids.device.type == "cpu" and not is_captured():
            needed, token = sum(self.image_token_counts(pixel_values, **options)), self.config.image_token_id
            check_token_count(input_ids == token, needed, token)

    def image_token_counts(self, pixel_values: Tensor, **options) -> list[int]:
        """Tokens of every image; `options`: those of `feature_options`."""
        return [self.config.image_seq_length] * len(pixel_values)

    def uncached_images(self, input_ids: Tensor, cached: int, pixel_values: Tensor, **options) -> Tensor | None:
        """[N] bool, False for images that stand in the first `cached` of input_ids [B, S].

        None where pixel_values does not hold the images of the whole conversation one by one.
        """
        mask = input_ids == self.config.image_token_id
        tokens = [int(part.sum()) for row in mask for part in (row[:cached], row[cached:])]
        counts = self.image_token_counts(pixel_values, **options)
        found = images_in_parts(tokens, counts)
        grouped = max(map(int, options.get("batch_num_images", ())), default=1) > 1
        if grouped or len(pixel_values) != sum(found) or sum(tokens) - sum(counts) >= min(counts, default=0):
            return None
        return torch.tensor([False, True] * len(mask)).repeat_interleave(torch.tensor(found))

    def _write_images(self, input_ids: Tensor, inputs_embeds: Tensor, pixel_values: Tensor, layers: Layers) -> Tensor:
        """The projector's last product writes its rows into inputs_embeds; returns a copy of those rows [rows, D]."""
        count, token = len(pixel_values) * self.config.image_seq_length, self.config.image_token_id
        if input_ids.device.type != "cpu":
            check_token_count(input_ids == token, count, token)
        rows = image_rows(input_ids == token, count)
        flat = inputs_embeds.view(-1, inputs_embeds.shape[-1])
        self.multi_modal_projector(self.encode_blocks(pixel_values, layers), self.vision_grid, out=flat, rows=rows)
        return flat[rows]

    def _writes_in_place(self, inputs_embeds: Tensor) -> bool:
        """Whether the rows may go straight into inputs_embeds: inference, one device and dtype, nothing watching."""
        if torch.compiler.is_compiling():  # first: torch 2.11 cannot trace the question about autocast
            return False
        projector, kind = self.multi_modal_projector, inputs_embeds.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return False
        if "forward" in vars(projector) or projector._forward_hooks or projector._forward_pre_hooks:
            return False
        weight = next(projector.parameters(), None)
        if weight is None or (weight.device, weight.dtype) != (inputs_embeds.device, inputs_embeds.dtype):
            return False
        return inputs_embeds.is_contiguous() and self._own_features() and not torch.is_grad_enabled()


class CompactGeneration(_Saved):
    """`generate()` in all its modes, of a CompactModel of the class `model_class`."""

    model_class: type[CompactModel]

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def run(self, stock: type[PreTrainedModel], **kwargs):
        return stock.forward(self, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As GenerationMixin.generate; counts image tokens before it encodes images, and generates none.

        With a cache, `pixel_values` may be those of the new turn or of the whole conversation.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        pixel_values, cache = kwargs.pop("pixel_values", None), kwargs.get("past_key_values", kwargs.get("cache"))
        if pixel_values is not None:
            self.model.check_pixels(pixel_values)
            options = {name: kwargs[name] for name in self.model.feature_options if name in kwargs}
            if cache is None:
                self.model.check_prompt(input_ids, pixel_values, **options)
            elif input_ids is not None:
                new = self.model.uncached_images(input_ids, int(cache.get_seq_length()), pixel_values, **options)
                if new is not None:
                    pixel_values = pixel_values[new.to(pixel_values.device)]
                    kwargs |= {name: torch.as_tensor(options[name])[new] for name in PER_IMAGE & options.keys()}
            if len(pixel_values):
                kwargs["pixel_values"] = pixel_values
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [self.config.image_token_id]
        return super().generate(inputs, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        """As GenerationMixin's, and images wherever the cache is empty: a prompt that is prefilled in chunks (in
        older transformers) and the draft model of assisted decoding are told that no iteration is their first."""
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # cache since transformers 5.24
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            is_first_iteration = True
        return super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """As GenerationMixin's, without the layers of the tower that no token needs."""
        encoded = model_kwargs.setdefault("mm_encoder_outputs", {})
        if model_kwargs.get("pixel_values") is not None and encoded.get("image") is None:
            names = ("pixel_values", *self.model.feature_options)
            images = self.model.tokens_of(**{name: model_kwargs.pop(name) for name in names if name in model_kwargs})
            images.pooler_output = list(images.pooler_output)
            encoded["image"] = images
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams repeat the images of a prompt as a group, A B A B; transformers 5.17 repeats each image, A A B B."""
        images = {}
        if expand_size > 1 and input_ids is not None and model_kwargs.get("pixel_values") is not None:
            options = {name: model_kwargs[name] for name in self.model.feature_options if name in model_kwargs}
            tokens = (input_ids == self.config.image_token_id).sum(1).tolist()
            counts = images_in_parts(tokens, self.model.image_token_counts(model_kwargs["pixel_values"], **options))
            images = {name: model_kwargs.pop(name) for name in ("pixel_values", "image_sizes") if name in model_kwargs}
            for name, value in images.items():
                images[name] = torch.cat([torch.cat([group] * expand_size) for group in value.split(counts)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images
