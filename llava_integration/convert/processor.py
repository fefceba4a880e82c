"""Tokenizer, image processor and chat template of SRC, as one LlavaStfProcessor."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from ..configuration import LlavaStfConfig
from ..processing import LlavaStfProcessor
from .checkpoint import read_json
from .errors import ConversionError, blamed_on
from .report import Report
from .sentencepiece import read_llama_tokenizer
from .vocabulary import IMAGE_TOKEN

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SPECIAL_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")
SETTINGS_FILE = "preprocessor_config.json"
SETTINGS = ("do_center_crop", "do_normalize", "do_rescale", "do_resize", "do_convert_rgb", "image_mean", "image_std",
            "resample", "rescale_factor", "size", "crop_size")  # fmt: skip
SIGLIP_NORMALIZATION = [0.5, 0.5, 0.5]


def read_tokenizer(folders: Sequence[Path], report: Report) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first folder that has one; None, and a warning, where none has."""
    folder = next((f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)), None)
    if folder is None:
        report.warnings.append(
            f"no tokenizer files ({' or '.join(TOKENIZER_FILES)}) in {folders[0]}: DST has a model and no processor"
        )
        return None
    if not (folder / "tokenizer.json").is_file():
        with blamed_on(f"{folder}: tokenizer_config.json or added_tokens.json", "get the files again"):
            return _tried(separate(read_llama_tokenizer(folder)))
    errors = []
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        try:
            return _tried(separate(kind.from_pretrained(folder, local_files_only=True)))
        except Exception as error:  # the tokenizers library raises bare Exception
            errors.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise ConversionError(f"{folder / 'tokenizer.json'}: expected a tokenizer, got {errors[0]}; get the files again")


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.encode(IMAGE_TOKEN)  # settings of a wrong type break it only now
    return tokenizer


def separate(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer` such that the text behind an image starts as a text of its own, which LLaVA was trained on.

    LLaVA encodes the pieces between its images one by one, and a Llama tokenizer puts a word boundary before each. In
    one pass it does so only with `legacy`, which LlamaTokenizer forgets when it is saved twice: so tokenizer.json
    has to say it, which only the generic class reads whole.
    """
    if not isinstance(tokenizer, LlamaTokenizer):
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None and hasattr(backend.pre_tokenizer, "prepend_scheme"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    kept = {name: getattr(tokenizer, name) for name in (*SPECIAL_TOKENS, "model_max_length", "padding_side")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **kept)


def read_image_settings(folders: Sequence[Path], report: Report) -> dict:
    """What the first preprocessor_config.json says, or the image_processor of a processor_config.json; {} without."""
    for folder in folders:
        if (folder / SETTINGS_FILE).is_file():
            return read_json(folder / SETTINGS_FILE)
        if (folder / "processor_config.json").is_file():
            found = read_json(folder / "processor_config.json").get("image_processor")
            if isinstance(found, dict):
                return found
    report.notes.append(f"no {SETTINGS_FILE}: the image processor is built from the vision tower's image size")
    return {}


def image_processor(vision: PreTrainedConfig, settings: dict, pad: bool) -> object:
    """The PIL image processor, which needs no torchvision, for images of the tower's size; `pad`: to a square first."""
    side = vision.image_size
    square = {"height": side, "width": side}
    siglip = vision.model_type == "siglip_vision_model"
    options = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    if siglip:
        options = {"size": square, "image_mean": SIGLIP_NORMALIZATION, "image_std": SIGLIP_NORMALIZATION} | options
        options["do_center_crop"] = False
    else:
        options = {"size": {"shortest_edge": side}, "crop_size": square} | options
    kind = SiglipImageProcessorPil if siglip and not pad else LlavaImageProcessorPil
    if kind is SiglipImageProcessorPil:
        options = {name: value for name, value in options.items() if name not in ("crop_size", "do_center_crop")}
    else:
        options["do_pad"] = pad
    with blamed_on(SETTINGS_FILE, "correct the file or remove it, and the processor is built from the tower"):
        made = kind(**options)
        shape = tuple(made(Image.new("RGB", (2 * side, side)), return_tensors="pt")["pixel_values"].shape[-2:])
    if shape != (side, side):
        raise ConversionError(
            f"{SETTINGS_FILE}: expected images of {side}x{side}, the vision tower's, got {shape[0]}x{shape[1]}; "
            "correct the file or remove it, and the processor is built from the tower"
        )
    return made


def make_processor(
    images: object,
    tokenizer: PreTrainedTokenizerBase,
    config: LlavaStfConfig,
    template: str | None,
    image_token: str = IMAGE_TOKEN,
) -> LlavaStfProcessor:
    """The processor of a model of `config`; ConversionError when the tokenizer has no room for the image token."""
    # What generation needs; a trainer sets its own. Only what is among init_kwargs is saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    try:
        processor = LlavaStfProcessor(
            images,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=template,
            image_token=image_token,
            spatial_merge_size=config.spatial_merge_size,
        )
    except ValueError as error:
        raise ConversionError(str(error)) from error
    rows = config.text_config.vocab_size
    if processor.image_token_id != config.image_token_index or len(tokenizer) > rows:
        raise ConversionError(
            f"tokenizer: expected at most {rows} tokens, the rows of the embeddings, and {image_token} with id "
            f"{config.image_token_index}, the configuration's, got {len(tokenizer)} tokens and id "
            f"{processor.image_token_id}; give SRC the tokenizer it was trained with"
        )
    return processor
