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
from transformers.utils import output_capturing
from transformers.utils.generic import can_return_tuple

from .config import CompactConfig, resolve_layers, vision_grid
from .insertion import check_token_count, image_rows, is_captured
from .projector import build_projector
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
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # of transformers' quantizers


class _Saved:
    """How models of both kinds are stored and loaded; in front of a PreTrainedModel."""

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As PreTrainedModel.save_pretrained, under the names of the modules and not of LLaVA's first checkpoints.

        `Trainer.train(resume_from_checkpoint=...)` drops other names and goes on without the weights.
        """
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
            raise ValueError(
                f"use_mbtf, multimodal_projector_bias: expected a place for the stored {unplaced[0]}, got use_mbtf="
                f"{model.config.use_mbtf}, multimodal_projector_bias={model.config.multimodal_projector_bias}; leave "
                "them as config.json has them"
            )
        dim = model.config.vision_config.hidden_size
        for name, stored, built in [] if load_config.ignore_mismatched_sizes else loading_info.mismatched_keys:
            for ending, axis, field, what in BUILT_BY:
                if name.endswith(ending) and stored[axis] != built[axis]:
                    old, new = (shape[axis] // (dim if axis else 1) for shape in (stored, built))
                    raise ValueError(
                        f"{field}: expected {what.format(old)}, for which the stored {name} was built, got {new}: "
                        f"{getattr(model.config, field)}; leave it as config.json has it, or train that weight anew "
                        "with ignore_mismatched_sizes=True"
                    )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


def _without_projector(quantization_config):
    """A copy of the configuration, an object or a dict, whose list of modules to skip has the projector in it."""
    given = copy.deepcopy(quantization_config)
    fields = given if isinstance(given, dict) else vars(given)
    bitsandbytes = any(fields.get(name) for name in ("load_in_4bit", "load_in_8bit"))
    known = [name for name in SKIP_LISTS if name in fields] or SKIP_LISTS[0 if bitsandbytes else 1 :]
    if isinstance(given, dict) or known[0] in fields:
        skipped = ["lm_head"] if fields.get(known[0]) is None else fields[known[0]]
        fields[known[0]] = [*skipped, "multi_modal_projector", "model.multi_modal_projector"]
    return given


def forward_of(stock: type[PreTrainedModel]) -> Callable:
    """The forward of a family's CompactModel: the signature of `stock`, and all that `stock` does after the images."""
    names = [*inspect.signature(stock.forward).parameters][1:]

    @can_return_tuple
    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        return self.run(stock, **dict(zip(names, args, strict=False)), **kwargs)

    return forward


def takes_videos(stock_forward: Callable) -> Callable:
    """`stock_forward`, with pixel_values_videos in the signature, which generate() asks."""

    @functools.wraps(stock_forward)
    def forward(self, *args, **kwargs):
        return stock_forward(self, *args, **kwargs)

    signature = inspect.signature(stock_forward)
    *others, rest = signature.parameters.values()
    videos = inspect.Parameter("pixel_values_videos", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor)
    forward.__signature__ = signature.replace(parameters=[*others, videos, rest])
    return forward


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
            raise TypeError(
                f"config: expected a {type(self).config_class.__name__}, got a {type(config).__name__}; "
                "llava_integration.from_llava makes a model of a stock one"
            )
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

    def encode_blocks(self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None) -> list[Tensor]:
        """pixel_values [N, 3, S, S] -> the tower's blocks, M x [N, prefix + H*W, C], on the projector's device."""
        blocks = tower_hidden_states(self.vision_tower, pixel_values, self._layers(vision_feature_layer))
        return [to_device_of(self.multi_modal_projector, block) for block in blocks]

    def _layers(self, given: int | list[int] | None) -> list[int]:
        given = self.config.vision_feature_layer if given is None else given  # a list, which anybody may change
        layers = resolve_layers(given, self.config.vision_config.num_hidden_layers)
        expected = getattr(self.multi_modal_projector, "num_blocks", len(layers))
        if len(layers) != expected:
            raise ValueError(f"vision_feature_layer: expected {expected} layers for this projector, got {layers}")
        return layers

    def project_images(self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None) -> Tensor:
        """pixel_values [N, 3, S, S] -> [N, (H//r)*(W//r), D]. Tensor in, tensor out: what torch.compile takes whole."""
        return self.multi_modal_projector(self._encode_all(pixel_values, vision_feature_layer), self.vision_grid)

    def _encode_all(self, pixel_values: Tensor, layers: int | list[int] | None) -> list[Tensor]:
        """`encode_blocks` chunk by chunk, and whole for the projector, which takes all images at once."""
        parts = [self.encode_blocks(part, layers) for part in image_chunks(self.vision_tower, pixel_values)]
        return parts[0] if len(parts) == 1 else [torch.cat(states) for states in zip(*parts, strict=True)]

    def image_outputs(
        self, pixel_values: Tensor, layers: int | list[int] | None = None, whole_tower: bool = True, **kwargs
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
            raise ValueError(
                f"vision_feature_select_strategy: expected {expected!r}, got {vision_feature_select_strategy!r}; the "
                "projector's windows cover the grid of patches, without a CLS token"
            )
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
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("pixel_values, mm_encoder_outputs: expected at most one of them, got both")
        options = {name: kwargs.pop(name) for name in self.feature_options if name in kwargs}
        if pixel_values is not None:
            self.check_options(**options)
            self.check_pixels(pixel_values)
            self.check_prompt(input_ids, pixel_values, **options)
            pixel_values = pixel_values if len(pixel_values) else None
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = None
        if pixel_values is not None and input_ids is not None and self._writes_in_place(embeds):
            tokens = self._write_images(input_ids, embeds, pixel_values, options.get("vision_feature_layer"))
        elif pixel_values is not None:
            encoded = self.tokens_of(pixel_values=pixel_values, **options)
        if encoded is not None:
            pooled = encoded.pooler_output
            tokens = pooled.flatten(0, 1) if isinstance(pooled, Tensor) else torch.cat(list(pooled))
            tokens = tokens.to(embeds.device, embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, embeds, tokens)
            embeds = embeds.masked_scatter(mask[0] if isinstance(mask, tuple) else mask, tokens)
        embeds, kwargs = self.insert_videos(input_ids, embeds, mm_encoder_outputs or {}, kwargs)
        outputs = stock.forward(self, inputs_embeds=embeds, return_dict=True, **kwargs)
        if tokens is None:
            return outputs
        if hasattr(outputs, "image_outputs"):  # since transformers 5.24
            per_image = tokens.unflatten(0, (-1, self.config.image_seq_length)) if encoded is None else None
            outputs["image_outputs"] = encoded or BaseModelOutputWithPooling(pooler_output=per_image)
        else:
            outputs["image_hidden_states"] = tokens
        return outputs

    def insert_videos(self, input_ids: Tensor | None, inputs_embeds: Tensor, encoded: dict, options: dict) -> tuple:
        """inputs_embeds with the videos of a family that takes them, and `options` of forward without those."""
        if options.pop("pixel_values_videos", None) is not None:
            raise ValueError(
                f"pixel_values_videos: expected none, {type(self).__name__} takes images alone; give the frames as "
                "images, each with a placeholder of its own"
            )
        return inputs_embeds, options

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor, token_id: int | None = None
    ) -> Tensor:
        """bool [B, S, 1], True at image tokens; ValueError unless they are as many as the rows of `image_features`.

        A prompt that is prefilled in chunks has parts of images in them.
        """
        token = self.config.image_token_id if token_id is None else token_id
        if input_ids is not None:
            mask = input_ids == token
        else:
            token_ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token_ids)).all(-1)
        rows = image_features.numel() // image_features.shape[-1]
        check_token_count(mask, rows / self.config.image_seq_length, self.config.image_seq_length, token)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def check_prompt(self, input_ids: Tensor | None, pixel_values: Tensor, **options) -> None:
        """ValueError unless ids on the CPU hold the image tokens that the images need, before anything runs.

        Counting on a GPU would wait for it; there the same check comes with the insertion.
        """
        if input_ids is not None and input_ids.device.type == "cpu" and not is_captured():
            self._check_count(input_ids == self.config.image_token_id, len(pixel_values))

    def images_in_rows(self, input_ids: Tensor, **options) -> list[int]:
        """How many images stand in each row of input_ids [B, S]."""
        return ((input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length).tolist()

    def uncached_images(self, input_ids: Tensor, pixel_values: Tensor, cached: int) -> Tensor:
        """pixel_values [N, ...] without the images that stand in the first `cached` of input_ids [B, S].

        As it is where it does not hold the images of the whole conversation.
        """
        mask, per_image = input_ids == self.config.image_token_id, self.config.image_seq_length
        old, new = (part.sum(1) // per_image for part in (mask[:, :cached], mask[:, cached:]))
        if len(pixel_values) != int((old + new).sum()):
            return pixel_values
        is_new = [torch.arange(a + b) >= a for a, b in zip(old.tolist(), new.tolist(), strict=True)]
        return pixel_values[torch.cat(is_new).to(pixel_values.device)]

    def _check_count(self, mask: Tensor, images: float) -> None:
        check_token_count(mask, images, self.config.image_seq_length, self.config.image_token_id)

    def _write_images(
        self, input_ids: Tensor, inputs_embeds: Tensor, pixel_values: Tensor, layers: int | list[int] | None
    ) -> Tensor:
        """The projector's last product writes its rows into inputs_embeds; returns a copy of those rows [rows, D]."""
        per_image = self.config.image_seq_length
        mask = input_ids == self.config.image_token_id
        if input_ids.device.type != "cpu":
            self._check_count(mask, len(pixel_values))
        rows = image_rows(mask, len(pixel_values) * per_image)
        flat = inputs_embeds.view(-1, inputs_embeds.shape[-1])
        self.multi_modal_projector(self._encode_all(pixel_values, layers), self.vision_grid, out=flat, rows=rows)
        return flat[rows]

    def _writes_in_place(self, inputs_embeds: Tensor) -> bool:
        """Whether the rows may go straight into inputs_embeds: inference, one device and dtype, nothing watching."""
        if torch.compiler.is_compiling():  # first: torch 2.11 cannot trace the question about autocast
            return False
        projector = self.multi_modal_projector
        weight = next(projector.parameters(), None)
        kind = inputs_embeds.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        watched = "forward" in vars(projector) or projector._forward_hooks or projector._forward_pre_hooks
        return not (
            torch.is_grad_enabled()
            or autocast
            or watched
            or not self._own_features()
            or weight is None
            or weight.device != inputs_embeds.device
            or weight.dtype != inputs_embeds.dtype
            or not inputs_embeds.is_contiguous()
        )


class CompactGeneration(_Saved):
    """`generate()` in all its modes, of a CompactModel of the class `model_class`."""

    model_class: type[CompactModel]

    def __init__(self, config: PreTrainedConfig):
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As GenerationMixin.generate; counts image tokens before it encodes images, and generates none.

        With a cache, `pixel_values` may be those of the new turn or of the whole conversation.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        pixel_values, cache = kwargs.pop("pixel_values", None), kwargs.get("past_key_values", kwargs.get("cache"))
        if pixel_values is not None:
            self.model.check_pixels(pixel_values)
            if cache is None:
                names = self.model.feature_options
                self.model.check_prompt(input_ids, pixel_values, **{n: kwargs[n] for n in names if n in kwargs})
            elif input_ids is not None:
                pixel_values = self.model.uncached_images(input_ids, pixel_values, int(cache.get_seq_length()))
            if len(pixel_values):
                kwargs["pixel_values"] = pixel_values
        if self.generation_config.suppress_tokens is None:
            self.generation_config.suppress_tokens = [self.config.image_token_id]
        return super().generate(inputs, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        """As GenerationMixin's, and images for the draft model of assisted decoding too, which the stock one drops.

        A draft model is told that no iteration is its first; that its cache is empty says that one is.
        """
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
            counts = self.model.images_in_rows(input_ids, **options)
            images = {name: model_kwargs.pop(name) for name in ("pixel_values", "image_sizes") if name in model_kwargs}
            for name, value in images.items():
                groups = [group.repeat(expand_size, *[1] * (value.ndim - 1)) for group in value.split(counts)]
                images[name] = torch.cat(groups)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images
