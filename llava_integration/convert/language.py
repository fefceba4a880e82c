"""The language model's configuration, from the config.json of an official checkpoint or its base."""

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from .errors import ConversionError, blamed_on

KINDS = {
    "llava_llama": LlamaConfig,
    "llava": LlamaConfig,
    "llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "mistral": MistralConfig,
}
NOT_FIELDS = ("model_type", "transformers_version", "architectures", "dtype", "_name_or_path")


def text_config(content: dict, rows: int) -> PreTrainedConfig:
    """`content`: config.json, in which vision and training fields lie beside those of the language model."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS or "text_config" in content:
        hint = ""
        if kind == "llava":
            hint = "; a LLaVA-1.5 folder of transformers is converted with `llava`"
        elif kind == "llava_stf":
            hint = "; this folder is converted already"
        raise ConversionError(f"SRC: config.json: expected model_type llava_llama, got {kind!r}{hint}")
    defaults = KINDS[kind]().to_dict()
    fields = {
        name: value
        for name, value in content.items()
        if name in defaults and name not in NOT_FIELDS and value is not None
    }
    with blamed_on("SRC: config.json", "get the file again"):
        fields.setdefault("rope_parameters", _rope(content))
        return KINDS[kind](**fields | {"vocab_size": rows})


def _rope(content: dict) -> dict:
    """rope_parameters from rope_theta and rope_scaling, as files before transformers 5 have them."""
    scaling = dict(content.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    return {"rope_theta": content.get("rope_theta") or 10000.0, "rope_type": kind or "default"} | scaling
