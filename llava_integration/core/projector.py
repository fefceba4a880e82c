"""The projector that a configuration describes. Its weights are patch-major: (dy * r + dx) * C + c."""

from transformers import PreTrainedConfig

from stf_kernels import CompactTokenProjector

from .config import ACTIVATIONS, prefix_tokens


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
