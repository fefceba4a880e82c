"""What an LLaVA-STF model is: towers, blocks, window, widths and element order, as config.json holds them.

    tokens per image = (H // r) * (W // r),   H = W = image_size // patch_size,   r = spatial_merge_size
    mbtf  M*C -> mbtf_hidden_size -> C        stf  r*r*C -> stf_hidden_size -> D

M = len(vision_feature_layer), C = vision hidden size, D = text hidden size. Source: arXiv 2506.07138.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, PreTrainedConfig

# Tokens in front of the patch grid (CLS), by model_type of the vision tower.
PREFIX_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}

# transformers' activation names -> the names of stf_kernels.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

FEATURE_ORDER = "patch_major"


def resolve_layers(layers: int | Sequence[int], num_layers: int, name: str = "vision_feature_layer") -> list[int]:
    """Indices into the tower's num_layers + 1 hidden states (0: embeddings, i: output of layer i), all non-negative.

    Raises TypeError for anything but ints, ValueError for none at all and for an index that the tower does not have.
    """
    given = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
    if not isinstance(given, (list, tuple)) or any(type(layer) is not int for layer in given):
        raise TypeError(f"{name}: expected an int or a list of ints, got {layers!r}")
    if not given:
        raise ValueError(f"{name}: expected at least one layer, got {layers!r}")
    for layer in given:
        if not -num_layers - 1 <= layer <= num_layers:
            raise ValueError(
                f"{name}: expected layers from {-num_layers - 1} to {num_layers} for a vision tower of "
                f"{num_layers} layers, got {layer} in {list(given)}"
            )
    return [layer % (num_layers + 1) for layer in given]


def prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens before the patches: 1 for CLIP, 0 for SigLIP; ValueError for towers with another interface."""
    model_type = vision_config.model_type
    if model_type not in PREFIX_TOKENS:
        raise ValueError(f"vision_config: expected one of the towers {list(PREFIX_TOKENS)}, got {model_type!r}")
    return PREFIX_TOKENS[model_type]


def vision_grid(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Patches (H, W) of the tower's square image."""
    side = vision_config.image_size // vision_config.patch_size
    return side, side


def projector_activation(name: str) -> str:
    """The activation of stf_kernels for transformers' `name`; ValueError when there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"projector_hidden_act: expected one of {list(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


@strict
class LlavaStfConfig(LlavaConfig):
    r"""Configuration of LLaVA-STF; everything LlavaConfig has, and:

    Args:
        vision_feature_layer (`int` or `list[int]`): hidden states of the tower in concatenation order; 0 is the
            embedding output, i the output of layer i. Stored non-negative.
        vision_feature_select_strategy (`"default"`, `"full"` or `None`): "default" drops the CLS token, "full" keeps
            all tokens. `None` is what the tower needs: "default" for CLIP, "full" for SigLIP, which has no CLS.
        spatial_merge_size (`int`): side r of the window that becomes one token; 1 is MBTF alone.
        spatial_merge_truncate (`bool`): drop the last rows and columns of a grid that r does not divide.
        image_seq_length (`int`, *optional*): tokens per image; derived, an error where it contradicts the grid.
        use_mbtf (`bool`): False is STF alone, for exactly one block.
        mbtf_hidden_size (`int`, *optional*): width between the two linears of MBTF, 4*C by default.
        stf_hidden_size (`int`, *optional*): width between the two linears of STF, 4*r*r*C by default.
        feature_order (`str`): element order of the merged feature axis in the stored weights. Always "patch_major".

    Raises:
        ValueError: for a layer that the tower does not have, a grid that does not divide, an `image_seq_length` or a
            select strategy that contradicts the tower, an unknown tower, activation or feature order.
    """

    model_type = "llava_stf"

    vision_feature_layer: int | list[int] | tuple[int, ...] = field(
        default_factory=lambda: [23, 21, 18, 15, 12, 9, 6, 3]
    )
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    spatial_merge_size: int = 2
    spatial_merge_truncate: bool = False
    image_seq_length: int | None = None
    use_mbtf: bool = True
    mbtf_hidden_size: int | None = None
    stf_hidden_size: int | None = None
    feature_order: str = FEATURE_ORDER

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        vision = self.vision_config
        self.vision_feature_layer = resolve_layers(self.vision_feature_layer, vision.num_hidden_layers)
        self._check_projector()
        self._check_tokens()
        if self.mbtf_hidden_size is None:
            self.mbtf_hidden_size = 4 * vision.hidden_size
        if self.stf_hidden_size is None:
            self.stf_hidden_size = 4 * self.spatial_merge_size**2 * vision.hidden_size
        for name in ("mbtf_hidden_size", "stf_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive width, got {getattr(self, name)}")

    def _check_projector(self) -> None:
        projector_activation(self.projector_hidden_act)
        if self.feature_order != FEATURE_ORDER:
            raise ValueError(
                f"feature_order: expected {FEATURE_ORDER!r}, the only order in which this model stores its weights, "
                f"got {self.feature_order!r}; relay stf.linear_1.weight out with stf_kernels.channel_to_patch_major"
            )
        if not self.use_mbtf and len(self.vision_feature_layer) != 1:
            raise ValueError(
                f"vision_feature_layer: expected one layer with use_mbtf=False, got {self.vision_feature_layer}"
            )

    def _check_tokens(self) -> None:
        vision, r = self.vision_config, self.spatial_merge_size
        has_cls = prefix_tokens(vision) > 0
        expected = "default" if has_cls else "full"
        if self.vision_feature_select_strategy not in (None, expected):
            raise ValueError(
                f"vision_feature_select_strategy: expected {expected!r} for a {vision.model_type} tower, which has "
                f"{'a' if has_cls else 'no'} CLS token, got {self.vision_feature_select_strategy!r}"
            )
        self.vision_feature_select_strategy = expected

        height, width = vision_grid(vision)
        if not 1 <= r <= min(height, width):
            raise ValueError(
                f"spatial_merge_size: expected 1 to {min(height, width)} for a {height}x{width} grid, got {r}"
            )
        if (height % r or width % r) and not self.spatial_merge_truncate:
            raise ValueError(
                f"spatial_merge_size: {r} does not divide the {height}x{width} grid of the vision tower; "
                "choose another or set spatial_merge_truncate=True to drop the last rows and columns"
            )
        tokens = (height // r) * (width // r)
        if self.image_seq_length not in (None, tokens):
            raise ValueError(
                f"image_seq_length: expected {tokens} for a {height}x{width} grid and spatial_merge_size={r}, "
                f"got {self.image_seq_length}"
            )
        self.image_seq_length = tokens
