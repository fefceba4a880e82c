"""A LLaVA-1.5 of a few thousand random parameters and its processor: stands in for a checkpoint in these examples.

With a real one: LlavaForConditionalGeneration.from_pretrained(path) and AutoProcessor.from_pretrained(path).
"""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", "What", "is", "this?", "A", "rocket."]
PIXELS, PATCH = 56, 14  # a 4x4 grid of vision tokens


def make_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(WORDS),
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS.index("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2,
    )
    return LlavaForConditionalGeneration(config).eval()


def make_processor(words: list[str] = WORDS, pixels: int = PIXELS, patch: int = PATCH) -> LlavaProcessor:
    """Its tokens are words; those in angle brackets are special."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([word for word in words if word.startswith("<")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    return LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_image() -> Image.Image:
    return Image.radial_gradient("L").convert("RGB")
