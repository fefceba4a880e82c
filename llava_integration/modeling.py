"""LLaVA-STF: the stock LLaVA with a compact projector that reads several blocks of a tower cut short.

    pixels [N, 3, S, S] -> blocks, M x [N, prefix + H*W, C] -> projector -> [N, (H//r)*(W//r), D] -> inputs_embeds

The blocks reach the projector as they are, CLS included: it skips prefix tokens by its strides, no concatenation.
"""

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from stf_kernels import CompactTokenProjector

from .configuration import LlavaStfConfig, prefix_tokens, projector_activation, resolve_layers, vision_grid
from .placement import check_token_count, image_rows, is_captured
from .saving import ModuleNames
from .vision_tower import image_chunks, to_device_of, tower_hidden_states


def build_projector(config: LlavaStfConfig, **factory) -> CompactTokenProjector:
    """The projector that `config` describes; `factory`: device, dtype."""
    return CompactTokenProjector(
        len(config.vision_feature_layer),
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        merge_size=config.spatial_merge_size,
        skip_tokens=prefix_tokens(config.vision_config),
        mbtf=config.use_mbtf,
        mbtf_hidden_dim=config.mbtf_hidden_size,
        stf_hidden_dim=config.stf_hidden_size,
        activation=projector_activation(config.projector_hidden_act),
        bias=config.multimodal_projector_bias,
        truncate=config.spatial_merge_truncate,
        feature_order=config.feature_order,
        **factory,
    )


def _without_projector(plan: dict) -> dict:
    """A dtype plan that keeps the projector in the model's dtype: unquantised, but in 16 bit as in `from_llava`."""
    return {name: dtype for name, dtype in plan.items() if not name.endswith("multi_modal_projector")}


class LlavaStfModel(ModuleNames, LlavaModel):
    """Vision tower, compact projector and language model, without the language modeling head."""

    config: LlavaStfConfig
    # Hidden states of a tower split over devices would have to be gathered; one device is always enough for it.
    _no_split_modules = ["CLIPVisionModel", "SiglipVisionModel", "CompactTokenProjector"]  # noqa: RUF012
    # The one list that every quantizer of transformers leaves alone, names from the root of either class.
    _keep_in_fp32_modules = ["multi_modal_projector", "model.multi_modal_projector"]  # noqa: RUF012

    def __init__(self, config: LlavaStfConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        return _without_projector(super()._get_dtype_plan(dtype))

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Patches (H, W) of one image."""
        return vision_grid(self.config.vision_config)

    def encode_blocks(self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None) -> list[Tensor]:
        """pixel_values [N, 3, S, S] -> the tower's blocks, M x [N, prefix + H*W, C], on the projector's device."""
        layers = self.config.vision_feature_layer
        if vision_feature_layer is not None:
            given = resolve_layers(vision_feature_layer, self.config.vision_config.num_hidden_layers)
            if len(given) != len(layers):
                raise ValueError(f"vision_feature_layer: expected {len(layers)} layers for this projector, got {given}")
            layers = given
        blocks = tower_hidden_states(self.vision_tower, pixel_values, layers)
        return [to_device_of(self.multi_modal_projector, block) for block in blocks]

    def project_images(self, pixel_values: Tensor, vision_feature_layer: int | list[int] | None = None) -> Tensor:
        """pixel_values [N, 3, S, S] -> [N, (H//r)*(W//r), D]. Tensor in, tensor out: what torch.compile takes whole."""
        parts = [
            self.multi_modal_projector(self.encode_blocks(part, vision_feature_layer), self.vision_grid)
            for part in image_chunks(self.vision_tower, pixel_values)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """`.pooler_output`: a list of N tensors [(H//r)*(W//r), D]. Frames of a video are N images, encoded together.

        Raises ValueError for `image_sizes` (the grid is fixed) and for a select strategy other than the config's.
        """
        self._check_options(vision_feature_select_strategy, image_sizes)
        features = self.project_images(pixel_values, vision_feature_layer)
        return BaseModelOutputWithPooling(pooler_output=list(features))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> tuple | LlavaModelOutputWithPast:
        """As LlavaModel.forward: input_ids [B, S], pixel_values [N, 3, S, S] or already encoded images.

        Token counts of ids on the CPU are checked before anything runs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them, got " + (
                "none" if input_ids is None else "both"))  # fmt: skip
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise ValueError("pixel_values, mm_encoder_outputs: expected at most one of them, got both")
        self._check_options(vision_feature_select_strategy, image_sizes)
        self.check_prompt(input_ids, pixel_values, encoded, past_key_values)

        own_embeds = inputs_embeds is None
        if own_embeds:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = None
        if pixel_values is not None and own_embeds and self._writes_in_place(inputs_embeds):
            features = self._write_images(input_ids, inputs_embeds, pixel_values, vision_feature_layer)
        elif pixel_values is not None:
            features = self.project_images(pixel_values, vision_feature_layer).flatten(0, 1)
            inputs_embeds = self._insert_images(input_ids, inputs_embeds, features)
        elif encoded is not None:
            features = torch.cat(list(encoded.pooler_output))
            inputs_embeds = self._insert_images(input_ids, inputs_embeds, features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """bool [B, S, 1], True at image tokens; ValueError unless they are as many as the rows of `image_features`.

        A prompt that is prefilled in chunks has parts of images in them.
        """
        mask = self._image_mask(input_ids, inputs_embeds)
        per_image, rows = self.config.image_seq_length, image_features.numel() // image_features.shape[-1]
        check_token_count(mask, rows / per_image, per_image, self._token_id)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @property
    def _token_id(self) -> int:
        return self.config.image_token_id

    def _image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        if input_ids is not None:
            return input_ids == self._token_id
        token = torch.full((), self._token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _insert_images(self, input_ids: Tensor | None, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        """Plain insertion: a copy of inputs_embeds whose image positions hold features [rows, D]; differentiable."""
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, features)
        return inputs_embeds.masked_scatter(mask, features)

    def _write_images(
        self, input_ids: Tensor, inputs_embeds: Tensor, pixel_values: Tensor, layers: int | list[int] | None
    ) -> Tensor:
        """The projector's last GEMM writes its rows into inputs_embeds; returns a copy of those rows [rows, D]."""
        count = pixel_values.shape[0] * self.config.image_seq_length
        mask = input_ids == self._token_id
        if input_ids.device.type != "cpu":
            check_token_count(mask, pixel_values.shape[0], self.config.image_seq_length, self._token_id)
        rows = image_rows(mask, count)
        flat = inputs_embeds.view(-1, inputs_embeds.shape[-1])
        done = 0
        for part in image_chunks(self.vision_tower, pixel_values):
            blocks, count = self.encode_blocks(part, layers), part.shape[0] * self.config.image_seq_length
            self.multi_modal_projector(blocks, self.vision_grid, out=flat, rows=rows[done : done + count])
            done += count
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
            or weight is None
            or weight.device != inputs_embeds.device
            or weight.dtype != inputs_embeds.dtype
            or not inputs_embeds.is_contiguous()
        )

    def _check_options(self, strategy: str | None, image_sizes: Tensor | None) -> None:
        expected = self.config.vision_feature_select_strategy
        if strategy not in (None, expected):
            raise ValueError(f"vision_feature_select_strategy: expected {expected!r} for this tower, got {strategy!r}")
        if image_sizes is not None:
            raise ValueError("image_sizes: expected None, every image has the grid of the vision tower; got sizes")

    def check_prompt(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, encoded=None, cache: Cache | None = None
    ) -> None:
        """ValueError unless ids on the CPU hold the image tokens that the images need; counting on a GPU would wait."""
        if input_ids is None or is_captured() or input_ids.device.type != "cpu":
            return
        per_image = self.config.image_seq_length
        if pixel_values is not None:
            check_token_count(input_ids == self._token_id, len(pixel_values), per_image, self._token_id)
        elif encoded is None and (cache is None or int(cache.get_seq_length()) == 0):
            # A lone image token may have been generated; a whole image's worth was a prompt that lost its image.
            mask = input_ids == self._token_id
            if int(mask.sum()) >= max(per_image, 2):
                check_token_count(mask, 0, per_image, self._token_id)


class LlavaStfForConditionalGeneration(ModuleNames, LlavaForConditionalGeneration):
    """LLaVA-STF with its language modeling head; `generate()` and every mode of it as for the stock LLaVA."""

    config: LlavaStfConfig

    def __init__(self, config: LlavaStfConfig):
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaStfModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        return _without_projector(super()._get_dtype_plan(dtype))

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As GenerationMixin.generate; counts image tokens before it encodes images, and takes pixel_values=None."""
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)
        if kwargs.get("past_key_values") is None:
            input_ids = kwargs.get("input_ids") if inputs is None else inputs
            encoded = kwargs.get("mm_encoder_outputs")
            self.model.check_prompt(input_ids, kwargs.get("pixel_values"), encoded)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As GenerationMixin's, and images for the draft model of assisted decoding too, which the stock one drops.

        A draft model is told that no iteration is its first; that its cache is empty says that one is.
        """
        if type(past_key_values) is DynamicCache and past_key_values.get_seq_length() == 0:
            is_first_iteration = True
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs
    ):
        """Beams repeat the images of a prompt as a group, A B A B; transformers 5.17 repeats each image, A A B B."""
        pixel_values = None
        if expand_size > 1 and input_ids is not None:
            pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            images = (input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
            groups = pixel_values.split(images.tolist())
            pixel_values = torch.cat([group.repeat(expand_size, 1, 1, 1) for group in groups])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
