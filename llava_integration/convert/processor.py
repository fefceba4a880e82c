"""Tokenizer, image processor and chat template of SRC, as the processor of the family."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from tokenizers import AddedToken, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedConfig, ProcessorMixin
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ..core.config import prefix_tokens, vision_grid
from ..core.register import family_of
from .checkpoint import read_json
from .report import ConversionError, Report, blamed_on, passed_on

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SPECIAL_TOKENS = ("unk_token", "bos_token", "eos_token", "pad_token")
SETTINGS_FILE = "preprocessor_config.json"
TILES = "image_grid_pinpoints"
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
ROWS_MULTIPLE = 64  # 32000 rows of embeddings become 32064, as in transformers' LLaVA checkpoints

# The prompt that LLaVA-1.5 and LLaVA-STF were trained on.
VICUNA_V1 = Path(__file__).with_name("vicuna_v1.jinja").read_text(encoding="utf-8")


def read_tokenizer(folders: Sequence[Path], report: Report) -> Tokenizer | None:
    """The tokenizer of the first folder that has one; None, and a warning, where none has."""
    folder = next((f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)), None)
    if folder is None:
        names = " or ".join(TOKENIZER_FILES)
        report.warnings.append(f"no tokenizer files ({names}) in {folders[0]}: DST has a model and no processor")
        return None
    if not (folder / "tokenizer.json").is_file():
        return read_sentencepiece(folder)
    try:
        try:
            return _tried(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception:  # a model_type that transformers does not know; the tokenizers library raises bare Exception
            return _tried(FastTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise ConversionError(f"{folder}/tokenizer.json: expected a tokenizer, got {error}; get it again") from error


def read_sentencepiece(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.model, with the settings and added tokens of the JSON files beside it."""
    file = folder / "tokenizer.model"
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as sentencepiece
    except ImportError as error:
        remedy = "pip install 'stf-kernels[convert]', or put a tokenizer.json beside it"
        raise ConversionError(f"{file}: reading it takes the packages sentencepiece and protobuf; {remedy}") from error
    try:
        model = sentencepiece.ModelProto.FromString(file.read_bytes())
        problem = None if model.pieces else "no pieces"
        if model.trainer_spec.model_type != sentencepiece.TrainerSpec.BPE:
            problem = problem or "a model of another kind"
    except DecodeError as error:
        problem = str(error)
    if problem:
        raise ConversionError(f"{file}: expected a byte-pair model of sentencepiece, got {problem}; get the file again")
    with blamed_on(f"{folder}: tokenizer_config.json or added_tokens.json", "get the files again"):
        tokenizer = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
        # Embeddings behind the pieces are found by id, and transformers numbers added tokens one behind the other.
        for token, index in read_json(folder / "added_tokens.json", missing_ok=True).items():
            if (got := tokenizer.convert_tokens_to_ids(token)) != index:
                raise ConversionError(f"{folder}: added token {token!r}: expected the next id, {got}, got {index}")
        return _tried(tokenizer)


def _tried(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer` such that the text behind an image starts with a word boundary, which LLaVA was trained on.

    A Llama tokenizer does so in one pass only with `legacy`, which LlamaTokenizer forgets when it is saved twice: so
    tokenizer.json has to say it, which only the generic class reads whole.
    """
    if isinstance(tokenizer, LlamaTokenizer):
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is None and hasattr(backend.pre_tokenizer, "prepend_scheme"):
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
        kept = {name: getattr(tokenizer, name) for name in (*SPECIAL_TOKENS, "model_max_length", "padding_side")}
        tokenizer = FastTokenizer(tokenizer_object=backend, clean_up_tokenization_spaces=False, **kept)
    tokenizer.encode(IMAGE_TOKEN)  # settings of a wrong type break it only now
    return tokenizer


def settle_vocabulary(tokenizer: Tokenizer | None, rows: int) -> tuple[int, int, int]:
    """Give `tokenizer` an image and a padding token, in place -> the embeddings that they need, and their ids.

    `rows`: embeddings that the checkpoint has. Without a tokenizer the ids are those that transformers' LLaVA
    checkpoints have: behind the last row.
    """
    if tokenizer is None:
        return _padded(rows + 2), rows, rows + 1
    present = tokenizer.get_vocab()
    last = max((index for token, index in present.items() if token not in (IMAGE_TOKEN, PAD_TOKEN)), default=-1)
    if last >= rows:
        remedy = f"there is no room for {IMAGE_TOKEN}: give SRC the tokenizer it was trained with"
        raise ConversionError(f"tokenizer: expected ids below {rows}, the rows of the embeddings, got {last}; {remedy}")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        # The unknown token as padding, as LLaVA has it, would mask unknown words in training.
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, normalized=False, special=True)})
    image, pad = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.pad_token_id
    if (ids := tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)) != [image]:
        raise ConversionError(f"tokenizer: expected {IMAGE_TOKEN} to be one token after adding it, got {ids}; mend it")
    needed = max(image, pad, last) + 1
    return _padded(needed) if needed > rows else rows, image, pad


def _padded(rows: int) -> int:
    return -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE


def read_image_settings(folders: Sequence[Path], report: Report) -> dict:
    """What the first preprocessor_config.json says, or the image_processor of a processor_config.json; {} without."""
    for folder in folders:
        if (folder / SETTINGS_FILE).is_file():
            return read_json(folder / SETTINGS_FILE)
        found = read_json(folder / "processor_config.json", missing_ok=True).get("image_processor")
        if isinstance(found, dict):
            return found
    report.notes.append(f"no {SETTINGS_FILE}: the image processor is built from the vision tower's image size")
    return {}


def image_processor(config: PreTrainedConfig, settings: dict) -> object:
    """The PIL image processor, which needs no torchvision, for images or tiles of the tower's size."""
    side, pad = config.vision_config.image_size, bool(settings.get("do_pad"))
    square = {"height": side, "width": side}
    siglip, tiled = config.vision_config.model_type == "siglip_vision_model", hasattr(config, TILES)
    stock = family_of(config).stock.__name__.replace("ForConditionalGeneration", "ImageProcessorPil")
    kind = getattr(transformers, "SiglipImageProcessorPil" if siglip and not pad and not tiled else stock)
    size = square if siglip or tiled else {"shortest_edge": side}
    options: dict[str, Any] = {"size": size, "crop_size": square}
    if tiled:
        options[TILES] = config.image_grid_pinpoints
        if settings.get(TILES, options[TILES]) != options[TILES]:
            what = f"expected the {TILES} of config.json, {options[TILES]}, got {settings[TILES]}"
            raise ConversionError(f"{SETTINGS_FILE}: {what}; tokens would not fit their tiles: correct one of them")
    if siglip:
        options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    known = kind.valid_kwargs.__annotations__
    options |= {name: value for name, value in settings.items() if name in known and value is not None}
    if not tiled:
        options |= {"do_pad": pad} | ({"do_center_crop": False} if siglip else {})
    remedy = "correct the file or remove it, and the processor is built from the tower"
    with blamed_on(SETTINGS_FILE, remedy):
        made = kind(**options)
        shape = tuple(made(Image.new("RGB", (2 * side, side)), return_tensors="pt")["pixel_values"].shape[-2:])
    if shape != (side, side):
        raise ConversionError(f"{SETTINGS_FILE}: expected images of {side}x{side}, got {shape[0]}x{shape[1]}; {remedy}")
    return made


def make_processor(
    settings: dict, tokenizer, config: PreTrainedConfig, template: str | None, image_token: str = IMAGE_TOKEN
) -> ProcessorMixin:
    """The processor of a model of `config`; ConversionError when the tokenizer has no room for the image token."""
    # What generation needs; a trainer sets its own. Only what is among init_kwargs is saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    kind, vision = family_of(config).processor, config.vision_config
    (side, _), r = vision_grid(vision), config.spatial_merge_size
    options = kind.sizes(vision.patch_size, side, r, prefix_tokens(vision))
    options |= {"chat_template": template, "image_token": image_token}
    names = ("vision_feature_select_strategy", "vision_aspect_ratio")
    options |= {name: getattr(config, name) for name in names if hasattr(config, name)}
    with passed_on():
        processor = kind(image_processor(config, settings), tokenizer, **options)
    rows = config.text_config.vocab_size
    if processor.image_token_id != config.image_token_index or len(tokenizer) > rows:
        expected = f"at most {rows} tokens, as embeddings, and {image_token} with id {config.image_token_index}"
        got = f"{len(tokenizer)} tokens and id {processor.image_token_id}"
        raise ConversionError(f"tokenizer: expected {expected}, got {got}; give SRC the one it was trained with")
    return processor
