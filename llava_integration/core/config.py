"""Layers, window, widths and token counts of a compact projector, and whether they agree with the vision tower.

    tokens per image = (H // r) * (W // r),   H = W = image_size // patch_size,   r = spatial_merge_size
    mbtf  M*C -> mbtf_hidden_size -> C        stf  r*r*C -> stf_hidden_size -> D

M = len(vision_feature_layer), C = vision hidden size, D = text hidden size. Source: arXiv 2506.07138.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig

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
DEFAULT_BLOCKS = 8


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


def complete(config: PreTrainedConfig) -> None:
    """Resolve layers and fill in what is None, in place; ValueError for what contradicts the tower or itself."""
    vision, act = config.vision_config, config.projector_hidden_act
    layers = config.vision_feature_layer = resolve_layers(config.vision_feature_layer, vision.num_hidden_layers)
    if act not in ACTIVATIONS:
        raise ValueError(f"projector_hidden_act: expected one of {list(ACTIVATIONS)}, got {act!r}")
    if config.feature_order != FEATURE_ORDER:
        raise ValueError(
            f"feature_order: expected {FEATURE_ORDER!r}, the only order in which this model stores its weights, "
            f"got {config.feature_order!r}; relay stf.linear_1.weight out with stf_kernels.channel_to_patch_major"
        )
    if not config.use_mbtf and len(layers) != 1:
        raise ValueError(f"vision_feature_layer: expected one layer with use_mbtf=False, got {layers}")
    cls, strategy = ("a", "default") if prefix_tokens(vision) else ("no", "full")
    if config.vision_feature_select_strategy not in (None, strategy):
        raise ValueError(
            f"vision_feature_select_strategy: expected {strategy!r} for a {vision.model_type} tower, which has {cls} "
            f"CLS token, got {config.vision_feature_select_strategy!r}"
        )
    config.vision_feature_select_strategy = strategy
    _check_tokens(config)
    if config.mbtf_hidden_size is None:
        config.mbtf_hidden_size = 4 * vision.hidden_size
    if config.stf_hidden_size is None:
        config.stf_hidden_size = 4 * config.spatial_merge_size**2 * vision.hidden_size
    for name in ("mbtf_hidden_size", "stf_hidden_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a positive width, got {getattr(config, name)}")


def _check_tokens(config: PreTrainedConfig) -> None:
    (height, width), r = vision_grid(config.vision_config), config.spatial_merge_size
    if not 1 <= r <= min(height, width):
        raise ValueError(f"spatial_merge_size: expected 1 to {min(height, width)} for a {height}x{width} grid, got {r}")
    if (height % r or width % r) and not config.spatial_merge_truncate:
        raise ValueError(
            f"spatial_merge_size: {r} does not divide the {height}x{width} grid of the vision tower; "
            "choose another or set spatial_merge_truncate=True to drop the last rows and columns"
        )
    tokens = (height // r) * (width // r)
    if config.image_seq_length not in (None, tokens):
        raise ValueError(
            f"image_seq_length: expected {tokens} for a {height}x{width} grid and spatial_merge_size={r}, "
            f"got {config.image_seq_length}"
        )
    config.image_seq_length = tokens
