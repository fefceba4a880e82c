"""Small random LLaVAs, their prompts, images and tokenizer, for the tests of llava_integration and its converters."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import llava_integration as li
import reference
from llava_integration.core import model as core_model

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
WORDS = ["USER", "ASSISTANT", "what", "is", "in", "the", "picture", "a", "cat", "and", "dog", ":"]
IMAGE_TOKEN = SPECIAL.index("<image>")
VOCAB, PIXELS, PATCH = 64, 56, 14  # a 4x4 grid

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": PIXELS}
VISION |= {"patch_size": PATCH}
TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TEXT |= {"max_position_embeddings": 512}


def clip(**changes):
    return CLIPVisionConfig(**{"num_hidden_layers": 6, "projection_dim": 32} | VISION | changes)


def siglip(**changes):
    return SiglipVisionConfig(**{"num_hidden_layers": 5} | VISION | changes)


def llama(**changes):
    return LlamaConfig(**TEXT | changes)


def randomize(module, amount=0.05):
    for parameter in module.parameters():  # zero biases and unit norms hide mistakes
        parameter.data.add_(torch.randn_like(parameter), alpha=amount)
    return module.eval()


def options(vision=None, text=None, **changes):
    parts = {"vision_config": vision or clip(), "text_config": text or llama(), "image_token_index": IMAGE_TOKEN}
    return parts | changes


def stock(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = LlavaConfig(**options(**{"image_seq_length": (PIXELS // PATCH) ** 2} | changes))
    return randomize(LlavaForConditionalGeneration(config).to(dtype))


def stf(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = li.LlavaStfConfig(**options(**{"vision_feature_layer": [5, 3, 1]} | changes))
    model = li.LlavaStfForConditionalGeneration(config).eval().to(dtype)
    randomize(model.model.multi_modal_projector, 0.1)
    return model


def with_reference(model, monkeypatch):
    """The same model and weights with the projector of reference/."""
    monkeypatch.setattr(core_model, "CompactTokenProjector", reference.CompactTokenProjector)
    other = type(model)(model.config).eval().to(model.dtype)
    other.load_state_dict(model.state_dict())
    assert type(other.model.multi_modal_projector) is reference.CompactTokenProjector
    return other


def load(folder, loader=AutoModelForImageTextToText, **options):
    """The model of a folder that holds every tensor and no other."""
    model, report = loader.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def oldest_name(name):
    """A module's name in the LLaVA checkpoints of 2023: language_model.model.*, vision_tower.vision_model.*"""
    name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("language_model.", "language_model.model.")
    return name.replace("lm_head", "language_model.lm_head")


def wide():
    """Sizes that the attention kernels of a GPU take."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    return {"vision": clip(**sizes), "text": llama(**sizes, num_key_value_heads=4)}


def run(model, ids, pixels, mask=None, grad=False):
    with torch.set_grad_enabled(grad):
        return model(input_ids=ids, pixel_values=pixels, attention_mask=mask)


def generate(model, ids, mask, pixels, **options):
    torch.manual_seed(3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    return model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)


def pixels(images, dtype=torch.float64, size=PIXELS):
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def prompt(images, per_image=4):
    """ids [B, S] and attention mask, `images[b]` images in prompt b, left-padded, text around every image.

    `per_image`: tokens of each, or a list of those of every image.
    """
    generator, prompts = torch.Generator().manual_seed(2), []
    counts = iter(per_image if isinstance(per_image, list) else [per_image] * sum(images))

    def text(count):
        return torch.randint(len(SPECIAL), VOCAB, (count,), generator=generator).tolist()

    for count in images:
        prompts.append([2, *text(2)])
        for _ in range(count):
            prompts[-1] += [IMAGE_TOKEN] * next(counts) + text(3)
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    return ids, (ids != 0).long()


def image(seed=0, size=(80, 60)):
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def square(side=PIXELS):
    """What makes a CLIP image processor give images of side x side."""
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def tokenizer(words=SPECIAL + WORDS, **options):
    """Word by word; a word in angle brackets is special."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([word for word in words if word.startswith("<")])
    options |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    pad = "<pad>" if "<pad>" in words else "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, **options)
