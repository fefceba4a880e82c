"""Layers, window, widths and token counts of a compact projector, and whether they agree with the vision tower.

    tokens per image = (H // r) * (W // r),   H = W = image_size // patch_size,   r = spatial_merge_size
    mbtf  M*C -> mbtf_hidden_size -> C        stf  r*r*C -> stf_hidden_size -> D

M = len(vision_feature_layer), C = vision hidden size, D = text hidden size. Source: arXiv 2506.07138.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedConfig

# Tokens in front of the patch grid (CLS), by model_type of the vision tower.
PREFIX_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}

# transformers' activation names -> the names of stf_kernels.
ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_tanh"), "gelu_tanh")

FEATURE_ORDER = "patch_major"
DEFAULT_BLOCKS = 8
Layers = int | list[int] | None  # as vision_feature_layer; None: the configuration's


def published_blocks(selected: int) -> list[int]:
    """Layer `selected`, then the multiples of three below it, deepest first: 23 -> [23, 21, 18, 15, 12, 9, 6, 3]."""
    return [selected, *range((selected - 1) // 3 * 3, 0, -3)]


def default_blocks(selected: int) -> list[int]:
    """The first eight of `published_blocks`; a tower too shallow gives min(8, selected) evenly spaced layers."""
    blocks = published_blocks(selected)
    if len(blocks) >= DEFAULT_BLOCKS:
        return blocks[:DEFAULT_BLOCKS]
    count = max(min(DEFAULT_BLOCKS, selected), 1)
    return [(2 * selected * k + count) // (2 * count) for k in range(count, 0, -1)]


def resolve_layers(layers: int | Sequence[int], num_layers: int, name: str = "vision_feature_layer") -> list[int]:
    """Indices into the tower's num_layers + 1 hidden states (0: embeddings, i: output of layer i), all non-negative.

    Raises TypeError for anything but ints, ValueError for none at all and for one that the tower does not have.
    """
    given = [layers] if isinstance(layers, int) and not isinstance(layers, bool) else layers
    if not isinstance(given, (list, tuple)) or any(type(layer) is not int for layer in given):
        raise TypeError(f"{name}: expected an int or a list of ints, got {layers!r}")
    if not given:
        raise ValueError(f"{name}: expected at least one layer, got {layers!r}")
    for layer in given:
        if not -num_layers - 1 <= layer <= num_layers:
            known = f"layers from {-num_layers - 1} to {num_layers} for a vision tower of {num_layers} layers"
            raise ValueError(f"{name}: expected {known}, got {layer} in {list(given)}")
    return [layer % (num_layers + 1) for layer in given]


def prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """Tokens before the patches: 1 for CLIP, 0 for SigLIP; ValueError for towers with another interface."""
    model_type = vision_config.model_type
    if model_type not in PREFIX_TOKENS:
        raise ValueError(f"vision_config: expected one of the towers {list(PREFIX_TOKENS)}, got {model_type!r}")
    return PREFIX_TOKENS[model_type]


def vision_grid(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Patches (H, W) of the tower's square image; ValueError for a tower whose images are not square."""
    image, patch = vision_config.image_size, vision_config.patch_size
    if type(image) is not int or type(patch) is not int or image < patch:
        raise ValueError(f"vision_config: expected a square grid of patches, got patches of {patch} in {image}")
    return image // patch, image // patch


def smallest_window(side: int, *, truncate: bool = False) -> int:
    """The smallest r from 2 that divides a grid of side x side, or any grid with `truncate`: 24 -> 2, 27 -> 3."""
    return next((r for r in range(2, side + 1) if truncate or side % r == 0), 1)


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class CompactConfig:
    r"""What a configuration has beside the stock one's fields, in front of whose class it stands.

    Fields agree with the tower and with each other however they came in. image_seq_length is derived: overwritten where
    a file or a dict says otherwise, refused where a caller does.

    Args:
        vision_feature_layer (`int` or `list[int]`): hidden states of the tower in concatenation order; 0 is the
            embedding output, i the output of layer i. Stored non-negative.
        vision_feature_select_strategy (`"default"`, `"full"` or `None`): "default" drops the CLS token, "full" keeps
            all tokens. `None` is what the tower needs: "default" for CLIP, "full" for SigLIP, which has no CLS.
        spatial_merge_size (`int`): side r of the window that becomes one token; 1 is MBTF alone.
        spatial_merge_truncate (`bool`): drop the last rows and columns of a grid that r does not divide.
        image_seq_length (`int`, *optional*): tokens per image or tile; derived, an error where it contradicts the grid.
        use_mbtf (`bool`): False is STF alone, for exactly one block.
        mbtf_hidden_size (`int`, *optional*): width between the two linears of MBTF, 4*C by default.
        stf_hidden_size (`int`, *optional*): width between the two linears of STF, 4*r*r*C by default.
        feature_order (`str`): element order of the merged feature axis in the stored weights. Always "patch_major".

    Raises ValueError for what contradicts the tower or itself, and for an unknown tower, activation or feature order.
    """

    vision_feature_layer: int | list[int] | tuple[int, ...] = field(default_factory=lambda: published_blocks(23))
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
        self._settle(self.image_seq_length)

    def __setattr__(self, name, value):
        ready, before = "_name_or_path" in vars(self), vars(self).get(name)  # the base class sets that one at its end
        super().__setattr__(name, value)
        if ready and name in FIELDS:
            try:
                self._settle(value if name == "image_seq_length" else None)
            except Exception:
                vars(self)[name] = before
                raise

    def __getattr__(self, name):
        if name == "auto_map":  # TRL reads it without a default
            return {}
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _settle(self, tokens: int | None) -> None:
        found = settled(self)
        if tokens not in (None, found["image_seq_length"]):
            (side, _), r = vision_grid(self.vision_config), self.spatial_merge_size
            expected = f"{found['image_seq_length']} for a {side}x{side} grid and spatial_merge_size={r}"
            raise ValueError(f"image_seq_length: expected {expected}, got {tokens}; leave it out, it is derived")
        vars(self).update(found)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As PreTrainedConfig.from_dict; keywords take the place of fields before any is checked."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"config: expected model_type {cls.model_type!r}, got {kind!r}; see from_llava")
        dropped = {"image_seq_length"}
        if config_dict.get("quantization_config") is None:
            dropped.add("quantization_config")  # null, as some tools write it
        config_dict = {name: value for name, value in config_dict.items() if name not in dropped}
        given = {name: kwargs.pop(name) for name in FIELDS & kwargs.keys()}
        if isinstance(given.get("vision_config"), dict):
            old = config_dict.get("vision_config") or {}
            given["vision_config"] = (old if isinstance(old, dict) else old.to_dict()) | given["vision_config"]
        return super().from_dict(config_dict | given, **kwargs)


# What depends on each other; every way to change one of them ends in `settled`.
FIELDS = {"vision_config", "projector_hidden_act", *CompactConfig.__annotations__}


def settled(config: PreTrainedConfig) -> dict[str, Any]:
    """Layers resolved and what is None filled in; ValueError for what contradicts the tower or itself."""
    vision, act = config.vision_config, config.projector_hidden_act
    layers = resolve_layers(config.vision_feature_layer, vision.num_hidden_layers)
    if act not in ACTIVATIONS:
        raise ValueError(f"projector_hidden_act: expected one of {list(ACTIVATIONS)}, got {act!r}")
    if config.feature_order != FEATURE_ORDER:
        remedy = "relay stf.linear_1.weight out with stf_kernels.channel_to_patch_major"
        raise ValueError(f"feature_order: expected {FEATURE_ORDER!r}, got {config.feature_order!r}; {remedy}")
    if not config.use_mbtf and len(layers) != 1:
        raise ValueError(f"vision_feature_layer: expected one layer with use_mbtf=False, got {layers}")
    cls, strategy = ("a", "default") if prefix_tokens(vision) else ("no", "full")
    if (got := config.vision_feature_select_strategy) not in (None, strategy):
        expected = f"{strategy!r} for a {vision.model_type} tower, which has {cls} CLS token"
        raise ValueError(f"vision_feature_select_strategy: expected {expected}, got {got!r}")
    (side, _), r = vision_grid(vision), config.spatial_merge_size
    if not 1 <= r <= side:
        raise ValueError(f"spatial_merge_size: expected 1 to {side} for a {side}x{side} grid, got {r}")
    if side % r and not config.spatial_merge_truncate:
        raise ValueError(f"spatial_merge_size: {r} does not divide the {side}x{side} grid; set spatial_merge_truncate")
    widths = {"mbtf_hidden_size": 4 * vision.hidden_size, "stf_hidden_size": 4 * r**2 * vision.hidden_size}
    widths |= {name: given for name in widths if (given := getattr(config, name)) is not None}
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name}: expected a positive width, got {width}")
    tokens = {"image_seq_length": (side // r) ** 2}
    return tokens | widths | {"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
