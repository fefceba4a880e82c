"""The parts of a model with a compact projector that do not depend on the family: mixins before the stock classes.

    pixels [N, 3, S, S] -> blocks, M x [N, prefix + H*W, C] -> projector -> [N, (H//r)*(W//r), D] -> inputs_embeds

The blocks reach the projector as they are, CLS included: it skips prefix tokens by its strides.
"""

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .config import resolve_layers, vision_grid
from .insertion import check_token_count, image_rows, is_captured
from .tower import image_chunks, to_device_of, tower_hidden_states


class _Saved:
    """How models of both kinds are stored and loaded; in front of a PreTrainedModel."""

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As PreTrainedModel.save_pretrained, under the names of the modules and not of LLaVA's first checkpoints.

        `Trainer.train(resume_from_checkpoint=...)` drops other names and goes on without the weights.
        """
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """The projector stays in the model's dtype: unquantised, but in 16 bit as in `from_llava`."""
        plan = super()._get_dtype_plan(dtype)
        return {name: dtype for name, dtype in plan.items() if not name.endswith("multi_modal_projector")}


class CompactModel(_Saved):
    """Images to tokens, and tokens into the prompt. Expects vision_tower, multi_modal_projector, language_model."""

    multi_modal_projector: nn.Module
    # Hidden states of a tower split over devices would have to be gathered; one device is always enough for it.
    _no_split_modules = ["CLIPVisionModel", "SiglipVisionModel", "CompactTokenProjector"]  # noqa: RUF012
    # The one list that every quantizer of transformers leaves alone, names from the root of either class.
    _keep_in_fp32_modules = ["multi_modal_projector", "model.multi_modal_projector"]  # noqa: RUF012

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

    def embed_prompt(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        encoded: BaseModelOutputWithPooling | None,
        layers: int | list[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """inputs_embeds [B, S, D] with the images in it, and their tokens [rows, D]."""
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if encoded is not None:
            features = torch.cat(list(encoded.pooler_output))
        elif pixel_values is None:
            return embeds, None
        elif input_ids is not None and self._writes_in_place(embeds):
            return embeds, self._write_images(input_ids, embeds, pixel_values, layers)
        else:
            features = self.project_images(pixel_values, layers).flatten(0, 1)
        features = features.to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(self.get_placeholder_mask(input_ids, embeds, features), features), features

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """bool [B, S, 1], True at image tokens; ValueError unless they are as many as the rows of `image_features`.

        A prompt that is prefilled in chunks has parts of images in them.
        """
        token = self.config.image_token_id
        if input_ids is not None:
            mask = input_ids == token
        else:
            token_ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token_ids)).all(-1)
        rows = image_features.numel() // image_features.shape[-1]
        self._check_count(mask, rows / self.config.image_seq_length)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def check_prompt(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, encoded=None, cache: Cache | None = None
    ) -> None:
        """ValueError unless ids on the CPU hold the image tokens that the images need; counting on a GPU would wait."""
        if input_ids is None or is_captured() or input_ids.device.type != "cpu":
            return
        mask, per_image = input_ids == self.config.image_token_id, self.config.image_seq_length
        if pixel_values is not None:
            self._check_count(mask, len(pixel_values))
        # A lone image token may have been generated; a whole image's worth was a prompt that lost its image.
        elif encoded is None and (cache is None or cache.get_seq_length() == 0) and mask.sum() >= max(per_image, 2):
            self._check_count(mask, 0)

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
        done = 0
        for part in image_chunks(self.vision_tower, pixel_values):
            blocks, count = self.encode_blocks(part, layers), len(part) * per_image
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


class CompactGeneration(_Saved):
    """`generate()` in all its modes. Expects a CompactModel as `model`."""

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As GenerationMixin.generate; counts image tokens before it encodes images, and takes pixel_values=None."""
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)
        if kwargs.get("past_key_values") is None:
            input_ids = kwargs.get("input_ids") if inputs is None else inputs
            self.model.check_prompt(input_ids, kwargs.get("pixel_values"), kwargs.get("mm_encoder_outputs"))
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ) -> dict:
        """As GenerationMixin's, and images for the draft model of assisted decoding too, which the stock one drops.

        A draft model is told that no iteration is its first; that its cache is empty says that one is.
        """
        if type(past_key_values) is DynamicCache and past_key_values.get_seq_length() == 0:
            is_first_iteration = True
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Beams repeat the images of a prompt as a group, A B A B; transformers 5.17 repeats each image, A A B B."""
        pixel_values = None
        if expand_size > 1 and input_ids is not None:
            pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            images = (input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
            groups = pixel_values.split(images.tolist())
            pixel_values = torch.cat([group.repeat(expand_size, 1, 1, 1) for group in groups])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
